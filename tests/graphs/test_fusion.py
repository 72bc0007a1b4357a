"""What is left after fusion, family by family: one node for each attention, one for each norm, nothing turned twice."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from families import FAMILIES, make_model
from llmopt.graphs.attention import spell_out
from llmopt.graphs.fusion import fuse_for_onnxruntime
from llmopt.graphs.gelu import fuse_tanh_gelus
from llmopt.graphs.nodes import permutation
from llmopt.graphs.running import made_up, outputs
from running import written

if TYPE_CHECKING:
    from collections.abc import Callable

CROSS = {"t5", "whisper"}
"""Families with an encoder, and with self and cross attention in each layer of the decoder."""

GELUS = {"gemma2": 2, "gemma3": 2, "gpt2": 2, "gpt_neox": 2, "bert": 2, "roberta": 3, "distilbert": 2, "vit": 2}
GELUS |= {"whisper": 4}
"""One in each layer; RoBERTa's head has one too. Whisper's convolutions have two more."""

TURNS = 4
"""Of an attention that is spelled out: queries, keys and values to heads, and back."""


def norms(name: str) -> int:
    """Return how many norms the model has."""
    kinds = [type(module).__name__ for module in make_model(FAMILIES[name]).modules()]
    return sum(kind.endswith("Norm") for kind in kinds)


def layers(name: str) -> int:
    """Return how many attentions the model has: two layers, in T5 and Whisper of either half."""
    return 6 if name in CROSS else 2


def around(node: ir.Node) -> list[ir.Node]:
    """Return the Transposes next to a node, or behind a Reshape."""
    found: list[ir.Node] = []
    near = [value.producer() for value in node.inputs[:3] if value is not None]
    near += [user for value in node.outputs[:1] for user in value.consumers()]
    for each in [one for one in near if one is not None]:
        if each.op_type == "Transpose":
            found.append(each)
        elif each.op_type == "Reshape":
            before = each.inputs[0].producer() if each.inputs[0] is not None else None
            further = [*each.outputs[0].consumers(), *([before] if before is not None else [])]
            found += [one for one in further if one.op_type == "Transpose"]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_is_fused(name: str, traced: Callable[[str], ir.Model]):
    model = traced(name)
    feed = made_up(model, 200, 0)
    (exact,) = outputs(model, [feed])
    before = sum(1 for _ in model.graph.all_nodes())
    report = fuse_for_onnxruntime(model, positions=128)
    (got,) = outputs(model, [feed])
    for one, two in zip(exact, got, strict=True):
        assert np.abs(one - two).max(initial=0) <= 1e-3 * max(1, np.abs(one).max(initial=0))
    decoder = FAMILIES[name].is_decoder
    assert report.counts["attention"] == layers(name)
    assert report.counts["group_query_attention"] == (layers(name) if decoder else 0)
    assert report.counts["norm"] == norms(name)
    assert report.counts["gelu"] >= GELUS.get(name, 0)
    assert [reason for what, reason in report.left if what.startswith(("norm", "gelu", "rotary"))] == []
    attention = [reason for what, reason in report.left if what.startswith("attention")]
    assert len(attention) == (0 if decoder else layers(name))
    assert len(report.matched) == layers(name) - len(attention)
    assert sum(1 for _ in model.graph.all_nodes()) < before
    for node in model.graph:
        if node.op_type in ("GroupQueryAttention", "RotaryEmbedding"):
            assert not around(node)
    # Nothing is turned, and at once turned back.
    for node in model.graph:
        turned = node.inputs[0].producer() if node.op_type == "Transpose" and node.inputs[0] is not None else None
        assert turned is None or turned.op_type != "Transpose"
    if not decoder:
        spell_out(model)
        heads = [node for node in model.graph if node.op_type == "Transpose" and len(permutation(node)) == 4]
        assert len(heads) <= TURNS * layers(name)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("c = Pow (x, three) d = Mul (c, k)", 1),
        ("b = Mul (x, x) c = Mul (b, x) d = Mul (k, c)", 1),
        ("c = Pow (x, two) d = Mul (c, k)", 0),
    ],
)
@pytest.mark.parametrize("opset", [18, 20])
def test_gelu_by_trial(text: str, count: int, opset: int):
    body = f'<ir_version: 10, opset_import: ["" : {opset}]> g (float[2, 8] x) => (float[2, 8] y) {{ h = Mul (x, half) '
    body += text + " e = Add (x, d) f = Mul (e, root) t = Tanh (f) a = Add (t, one) y = Mul (h, a) }"
    constants: dict[str, Any] = {"half": 0.5, "three": 3, "two": 2, "k": 0.044715, "root": np.sqrt(2 / np.pi), "one": 1}
    model = written(body, **{name: np.float32(number) for name, number in constants.items() if name in body})
    feed = {"x": np.linspace(-4, 4, 16, dtype=np.float32).reshape(2, 8)}
    (exact,) = outputs(model, [feed])
    assert fuse_tanh_gelus(model) == count
    (got,) = outputs(model, [feed])
    operators = Counter(node.op_type for node in model.graph)
    assert operators["Gelu" if opset == 20 else "FastGelu"] == count
    assert len(model.graph) == (1 if count else len(model.graph))
    assert np.abs(exact[0] - got[0]).max() < 1e-6
