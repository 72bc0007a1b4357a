"""What `llmopt.Attention` and `llmopt.Mask` are spelled out to gives what they mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from llmopt.exporters.onnx_attention import attention, mask
from llmopt.graphs.attention import ATTENTION, DOMAIN, MASK, attentions, spell_out

BATCH, HEADS, SIZE = 2, 4, 8


def graph(*, key_heads: int, causal: bool, window: int, softcap: float, padded: bool, short: bool = False) -> ir.Model:
    """Return a graph that is one attention with one mask."""
    kinds = {
        "query": (ir.DataType.FLOAT, (BATCH, HEADS, "queries", SIZE)),
        "key": (ir.DataType.FLOAT, (BATCH, key_heads, "keys", SIZE)),
        "value": (ir.DataType.FLOAT, (BATCH, key_heads, "keys", SIZE)),
        "padding": (ir.DataType.INT64, (BATCH, "keys")),
        **dict.fromkeys(("batch", "queries", "keys"), (ir.DataType.INT64, ())),
    }
    values = {
        name: ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))
        for name, (kind, shape) in kinds.items()
    }
    seen = ir.node(
        MASK,
        [values["padding"] if padded else None, values["batch"], values["queries"], values["keys"]],
        domain=DOMAIN,
        attributes={"causal": int(causal), "window": window},
    )
    seen.outputs[0].dtype = ir.DataType.BOOL
    settings = {"scale": 0.3, "softcap": softcap, "causal": 0, "short": int(short)}
    made = ir.node(
        ATTENTION,
        [values["query"], values["key"], values["value"], seen.outputs[0]],
        domain=DOMAIN,
        attributes=settings,
    )
    made.outputs[0].name, made.outputs[0].dtype = "output", ir.DataType.FLOAT
    seen.outputs[0].name = "seen"
    body = ir.Graph(
        list(values.values()), [made.outputs[0], seen.outputs[0]], nodes=[seen, made], opset_imports={"": 20}, name="g"
    )
    return ir.Model(body, ir_version=10)


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("causal", "window", "softcap", "key_heads", "queries"),
    [(False, 0, 0.0, 4, 7), (True, 0, 0.0, 2, 7), (True, 3, 0.0, 4, 3), (True, 2, 1.5, 1, 1)],
)
def test_spelled_out(
    padded: bool, short: bool, causal: bool, window: int, softcap: float, key_heads: int, queries: int, tmp_path: Path
):
    model = graph(key_heads=key_heads, causal=causal, window=window, softcap=softcap, padded=padded, short=short)
    found = attentions(model)
    assert [(one.heads, one.key_heads, one.head_size) for one in found] == [(HEADS, key_heads, SIZE)]
    assert spell_out(model) == 1
    assert {node.domain for node in model.graph} == {""}
    ir.save(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    torch.manual_seed(0)
    keys = 7
    query = torch.randn(BATCH, HEADS, queries, SIZE)
    key, value = torch.randn(2, BATCH, key_heads, keys, SIZE)
    padding = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * keys])
    seen = mask(padding if padded else None, BATCH, queries, keys, causal, window)
    expected = attention(query, key, value, seen, 0.3, softcap, False)
    feed = {"query": query, "key": key, "value": value, "padding": padding}
    feed = {name: tensor.numpy() for name, tensor in feed.items()}
    feed |= {"batch": np.array(BATCH), "queries": np.array(queries), "keys": np.array(keys)}
    names = {value.name for value in session.get_inputs()}
    got, got_seen = session.run(["output", "seen"], {key: array for key, array in feed.items() if key in names})
    assert (got_seen == seen.numpy()).all()
    reads = seen.any(-1)[:, 0].numpy()  # a query that sees nothing gives what nobody reads
    assert np.abs(got[reads] - expected.numpy()[reads]).max() < 1e-5
