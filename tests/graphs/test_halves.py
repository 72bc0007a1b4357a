"""A graph in float16: what would overflow or lose stays in float32, and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from helpers import build, recipe
from llmopt.core.errors import LlmoptError
from llmopt.graphs.attention import spell_out
from llmopt.graphs.fusion import fuse_for_onnxruntime
from llmopt.graphs.half_limits import FULL, HALF
from llmopt.graphs.halves import to_halves
from llmopt.graphs.running import made_up, outputs
from llmopt.graphs.shapes import infer_shapes
from running import names, written

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HEAD = '<ir_version: 10, opset_import: ["" : 20]> g '
X = np.linspace(-2, 2, 16, dtype=np.float32).reshape(2, 8)


def halved(text: str, feed: dict[str, Any] | None = None, *, keep_io: bool = True, **constants: Any) -> Any:
    """Return the graph in float16, what was done, and its outputs before and after."""
    model = written(HEAD + text, **constants)
    infer_shapes(model)
    feeds = [{"x": X} if feed is None else feed]
    (exact,) = outputs(model, feeds)
    report = to_halves(model, feeds, keep_io=keep_io)
    kinds = {str(value.name): value.dtype.numpy() for value in model.graph.inputs}
    (got,) = outputs(model, [{name: array.astype(kinds[name]) for name, array in feeds[0].items()}])
    return model, report, exact, got


def kinds(model: ir.Model) -> dict[str, ir.DataType | None]:
    """Return what each operator but the casts makes."""
    return {node.op_type: node.outputs[0].dtype for node in model.graph if node.op_type != "Cast"}


def test_what_overflows_stays_in_float32():
    text = "(float[B, 8] x) => (float[B, 8] y) { a = Mul (x, big) b = Mul (a, big) c = Div (b, big) "
    text += "d = Div (c, big) y = Tanh (d) }"
    model, report, exact, got = halved(text, big=np.float32(2e4))
    assert kinds(model) == {"Mul": FULL, "Div": FULL, "Tanh": HALF}
    up_to = {"Mul 0": "4e+04", "Mul 1": "4e+04", "Div 0": "8e+08", "Div 1": "4e+04"}
    assert {name: reason.removeprefix("values up to ") for name, reason in report.full} == up_to
    assert np.abs(got[0] - exact[0]).max() < 1e-3
    # In float16 alone it would be infinite.
    with np.errstate(over="ignore"):
        assert not np.isfinite(X.astype(np.float16) * np.float16(2e4) * np.float16(2e4)).all()


def test_what_vanishes_stays_in_float32():
    text = "(float[B, 8] x) => (float[B, 8] y, float[B, 8] z) { a = Mul (x, small) b = Mul (a, a) c = Add (b, tiny) "
    text += "r = Sqrt (c) y = Div (a, r) s = Abs (x) z = Add (s, tiny) }"
    _model, report, exact, got = halved(text, small=np.float32(1e-4), tiny=np.float32(1e-12))
    reasons = dict(report.full)
    assert reasons["Add 0"].startswith("no value above")
    assert reasons["Add 1"] == "a constant of 1e-12"
    assert np.abs(got[0] - exact[0]).max() < 2e-3


def test_sums_in_norms():
    text = "(float[B, 8] x) => (float[B, 1] y, float[B, 1] z) { a = Mul (x, factor) b = ReduceL2 <keepdims: int = 1> "
    text += "(a, axes) y = Log (b) z = ReduceL2 (x, axes) }"
    _, report, exact, got = halved(text, factor=np.float32(200), axes=np.array([-1]))
    assert dict(report.full) == {"ReduceL2 0": "a sum up to 1.28e+06"}
    assert np.abs(got[0] - exact[0]).max() < 1e-2


def test_positions_and_their_angles():
    text = "(int64[T] x) => (float[T, 4] y, float[T] z) { f = Cast <to: int = 1> (x) u = Unsqueeze (f, last) "
    text += "a = Mul (u, slow) y = Cos (a) z = Mul (f, slower) }"
    positions = np.arange(0, 9000, 7)
    _model, report, exact, got = halved(
        text,
        {"x": positions},
        last=np.array([1]),
        slow=np.array([[1, 0.1, 0.01, 0.001]], np.float32),
        slower=np.float32(0.5),
    )
    assert dict(report.full)["Cos 0"] == "it turns positions"
    assert {"Mul 0", "Cast 0"} <= set(dict(report.full))
    assert np.abs(got[0] - exact[0]).max() < 1e-6


def test_what_becomes_whole_numbers():
    """As T5's buckets of distances: a number that is a little too small falls into the bucket before."""
    text = "(float[B, 8] x) => (int64[B, 8] y) { s = Abs (x) a = Add (s, one) l = Log (a) m = Mul (l, factor) "
    text += "y = Cast <to: int = 7> (m) }"
    feed = {"x": np.linspace(0, 50, 4000, dtype=np.float32).reshape(-1, 8)}
    _model, report, exact, got = halved(text, feed, one=np.float32(1), factor=np.float32(16 / np.log(8)))
    assert dict(report.full)["Log 0"] == "it is made into whole numbers"
    assert (exact[0] == got[0]).all()


def test_masks_are_clamped_and_a_row_that_sees_nothing_is_finite():
    text = "(float[B, 8] x, bool[B, 8] seen) => (float[B, 8] y) { bias = Where (seen, zero, lowest) "
    text += "scores = Add (x, bias) y = Softmax <axis: int = -1> (scores) }"
    seen = np.array([[True] * 5 + [False] * 3, [False] * 8])
    feed = {"x": X, "seen": seen}
    _model, report, exact, got = halved(text, feed, zero=np.float32(0), lowest=np.finfo(np.float32).min)
    assert (report.masks, report.full) == (1, [])
    assert np.isfinite(got[0]).all()
    assert np.abs(got[0][0] - exact[0][0]).max() < 1e-3
    assert (got[0][0, 5:] == 0).all()


def test_large_exponents_keep_their_scores():
    text = "(float[B, 8] x) => (float[B, 4] y, float[B, 4] z) { s = MatMul (x, large) y = Softmax (s) "
    text += "t = MatMul (x, little) z = Softmax (t) }"
    matrix = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    _, report, *_ = halved(text, large=matrix * 40, little=matrix)
    assert {name for name, _ in report.full} == {"MatMul 0", "Softmax 0"}


def test_one_cast_for_each_value_and_none_where_float32_only_passes_through():
    text = "(float[B, 8] x) => (float[2, B, 4] y) { a = Mul (x, big) b = Mul (a, big) r = Reshape (b, shape) "
    text += (
        "c = Div (r, big) d = Div (c, big) p = Relu (d) q = Tanh (d) s = Sigmoid (d) e = Add (p, q) y = Add (e, s) }"
    )
    model, report, exact, got = halved(text, big=np.float32(2e4), shape=np.array([2, -1, 4]))
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert len(casts) == report.casts == 2  # in front of the three, and of the output
    assert kinds(model)["Reshape"] == FULL
    assert np.abs(got[0] - exact[0]).max() < 5e-3


@pytest.mark.parametrize("keep_io", [True, False])
def test_inputs_and_outputs(keep_io: bool):
    text = "(float[B, 8] x) => (float[B, 8] y, float[B, 8] w) { y = Tanh (x) w = Relu (y) }"
    model, _, exact, got = halved(text, keep_io=keep_io)
    assert names(model) == (["x"], ["y", "w"])
    expected = np.float32 if keep_io else np.float16
    assert {array.dtype for array in got} == {np.dtype(expected)}
    assert {value.dtype for value in [*model.graph.inputs, *model.graph.outputs]} == {FULL if keep_io else HALF}
    assert all(np.abs(one - two).max() < 2e-3 for one, two in zip(exact, got, strict=True))


def test_an_inner_graph_reads_float32():
    text = (
        "(float[B, 8] x, bool c) => (float[B, 8] y) { a = Tanh (x) y = If (c) <then_branch = t () => (float[B, 8] p) "
    )
    text += "{ p = Relu (a) }, else_branch = e () => (float[B, 8] q) { q = Neg (a) }> }"
    feed = {"x": X, "c": np.array(True)}
    model, report, exact, got = halved(text, feed)
    assert dict(report.full) == {"If 0": "it contains a graph"}
    assert kinds(model)["Tanh"] == HALF
    assert np.abs(got[0] - exact[0]).max() < 2e-3


@pytest.mark.parametrize(
    ("name", "lost"), [("bert", 1e-4), ("llama", 1e-5), ("gpt2", 1e-5), ("mixtral", 1e-4), ("t5", 1e-4)]
)
@pytest.mark.parametrize("fused", [True, False])
def test_families(name: str, lost: float, fused: bool, traced: Callable[[str], ir.Model]):
    model = traced(name)
    if fused:
        fuse_for_onnxruntime(model, positions=128)
    spell_out(model)
    infer_shapes(model)
    feeds = [made_up(model, 200, seed) for seed in range(2)]
    exact = list(outputs(model, feeds))
    report = to_halves(model, feeds)
    assert report.half > 10 * len(report.full)
    weights = Counter(value.dtype for value in model.graph.initializers.values() if value.const_value.size > 512)
    assert set(weights) == {HALF}
    for expected, got in zip(exact, outputs(model, feeds), strict=True):
        for one, two in zip(expected, got, strict=True):
            norms = np.linalg.norm(one) * np.linalg.norm(two)
            assert one.dtype == two.dtype
            assert 1 - float((one * two).sum()) / norms < lost


def test_codes_of_torch_passes_lie_in_a_float16_graph(family: Callable[[str], Path], tmp_path: Path):
    steps = [("rtn", {"bits": 8, "group_size": 32}), ("fuse", {}), ("cast-fp16", {"max_drop": 0.01})]
    manifest = build(recipe(family("llama"), *steps, export=("onnx", {"activations": "float32"})), tmp_path / "out")
    (record,) = manifest.exports
    assert record.verification is not None
    assert record.verification.passed
    assert record.verification.weights_equal is True
    assert any("made-up inputs" in note for note in record.passes[-1].notes)
    model = ir.load(tmp_path / "out/model.onnx")
    assert {value.dtype for value in model.graph.outputs} == {FULL}
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert len(nodes) > 8
    assert {node.inputs[2].dtype for node in nodes} == {HALF}


def test_a_graph_without_float32_is_refused(tmp_path: Path):
    import onnx

    text = HEAD + "(int64[B, 8] input_ids) => (int64[B, 8] y) { y = Abs (input_ids) }"
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    with pytest.raises(LlmoptError, match="no node of the graph can compute in float16"):
        build(recipe(tmp_path / "model.onnx", ("cast-fp16", {}), export=("onnx", {})), tmp_path / "out")
