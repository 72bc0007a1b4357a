"""Feed-forwards on rows of tokens: the same answers, and nothing joined that is no feed-forward."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from families import FAMILIES, make_model, make_tokenizer
from helpers import build, recipe
from llmopt.graphs.padding import remove_padding
from llmopt.graphs.rows import join_texts
from llmopt.graphs.token_index import Layout
from running import largest_difference, names, run, written

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx_ir as ir

GENERATOR = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("bert", 2), ("distilbert", 2), ("t5", 4), ("vit", 2), ("llama", 2), ("gemma2", 2)],
)
def test_families(name: str, layers: int, traced: Callable[[str], ir.Model]):
    model = traced(name)
    exact, before = run(model), names(model)
    nodes = Counter(node.op_type for node in model.graph)
    assert join_texts(model) == layers
    assert largest_difference(exact, run(model)) < 1e-6
    assert names(model) == before
    added = Counter(node.op_type for node in model.graph) - nodes
    assert added == {"Reshape": 2 * layers, "Shape": layers, "Concat": layers}
    assert join_texts(model) == 0


def multilayer(rest: str, outputs: str = "float[b, t, 8] y", read: str = "b, t, 8") -> ir.Model:
    """Return a graph that ends with `rest` and multiplies by (8, 16), (16, 16) and (16, 8)."""
    text = f'<ir_version: 10, opset_import: ["" : 20]> agraph (float[{read}] x) => ({outputs}) {{ {rest} }}'
    sizes = {"first": (8, 16), "middle": (16, 16), "last": (16, 8), "bias": (16,), "places": (5, 16)}
    numbers = {each: GENERATOR.normal(size=size).astype(np.float32) for each, size in sizes.items() if each in rest}
    model = written(text, **numbers)
    from onnx_ir.passes.common import ShapeInferencePass

    ShapeInferencePass()(model)
    return model


def feed(*shape: int) -> dict[str, Any]:
    return {"x": GENERATOR.normal(size=shape).astype(np.float32)}


@pytest.mark.parametrize(
    ("rest", "count"),
    [
        ("a = MatMul(x, first) b_ = Relu(a) y = MatMul(b_, last)", 0),  # it is the graph's output itself
        ("a = MatMul(x, first) c = Relu(a) d = MatMul(c, last) y = Neg(d)", 1),
        ("a = MatMul(x, first) c = Add(a, bias) d = Relu(c) e = MatMul(d, last) y = Neg(e)", 1),
        ("a = MatMul(x, first) c = MatMul(a, last) y = Neg(c)", 0),  # no activation
        ("a = MatMul(x, first) c = Add(a, places) d = Relu(c) e = MatMul(d, last) y = Neg(e)", 0),  # by place
        ("a = MatMul(x, first) c = Softmax(a) d = Relu(c) e = MatMul(d, last) y = Neg(e)", 0),
        # A chain of three, of which two are one.
        ("a = MatMul(x, first) c = Relu(a) d = MatMul(c, middle) e = Relu(d) f = MatMul(e, last) y = Neg(f)", 1),
        # One gates the other.
        ("a = MatMul(x, first) c = Sigmoid(a) d = MatMul(x, first) e = Mul(c, d) f = MatMul(e, last) y = Neg(f)", 1),
    ],
)
def test_what_is_a_feed_forward(rest: str, count: int):
    model = multilayer(rest)
    given = feed(3, 5, 8)
    exact = run(model, given)
    assert join_texts(model) == count
    assert largest_difference(exact, run(model, given)) < 1e-6


def test_what_else_reads_the_middle_leaves_it_alone():
    rest = "a = MatMul(x, first) c = Relu(a) d = MatMul(c, last) y = Neg(d) z = Neg(c)"
    assert join_texts(multilayer(rest, "float[b, t, 8] y, float[b, t, 16] z")) == 0
    rest = "a = MatMul(x, first) z = Relu(a) d = MatMul(z, last) y = Neg(d)"
    assert join_texts(multilayer(rest, "float[b, t, 8] y, float[b, t, 16] z")) == 0


@pytest.mark.parametrize(("read", "outputs"), [("t, 8", "float[t, 8] y"), ("a, b, t, 8", "float[a, b, t, 8] y")])
def test_other_than_three_axes(read: str, outputs: str):
    rest = "a = MatMul(x, first) c = Relu(a) d = MatMul(c, last) y = Neg(d)"
    assert join_texts(multilayer(rest, outputs, read)) == 0


@pytest.mark.parametrize(("batch", "tokens"), [(4, 7), (4, 1), (1, 7)])
def test_a_fixed_size(batch: int, tokens: int):
    rest = "a = MatMul(x, first) c = Relu(a) d = MatMul(c, last) y = Neg(d)"
    model = multilayer(rest, f"float[{batch}, {tokens}, 8] y", f"{batch}, {tokens}, 8")
    given = feed(batch, tokens, 8)
    exact = run(model, given)
    assert join_texts(model) == (batch > 1)
    assert largest_difference(exact, run(model, given)) < 1e-6


def test_without_padding_they_are_rows_already(traced: Callable[[str], ir.Model]):
    model = traced("bert")
    assert remove_padding(model, Layout(2, whole=True, short=32)).attentions == 2
    assert join_texts(model) == 0


def test_openvino_gets_them(tmp_path: Path):
    pytest.importorskip("openvino")
    make_model(FAMILIES["bert"]).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    manifest = build(recipe(tmp_path / "model", ("fuse", {}), export=("openvino", {})), tmp_path / "out")
    parity = manifest.exports[0].verification
    assert parity is not None
    assert parity.passed
    assert manifest.exports[0].passes[0].metrics["feed_forwards_in_rows_count"] == 2
