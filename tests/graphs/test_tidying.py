"""fold, simplify, fix_axes and convert_opset: the same answers from every family's graph, and what each takes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt.graphs.folding import Size, fold
from llmopt.graphs.opsets import ConversionError, convert_opset, opset_of
from llmopt.graphs.shapes import axis_name, fix_axes, infer_shapes, input_axes
from llmopt.graphs.simplification import simplify
from running import SIZES, largest_difference, names, run, written

if TYPE_CHECKING:
    from pathlib import Path

HEADER = '<ir_version: 10, opset_import: ["" : 20]>'
QUICK = {"bert", "gpt2", "t5"}
BASICS = {
    "fold": fold,
    "simplify": simplify,
    "fix": lambda model: (fix_axes(model, SIZES), fold(model)),
    "up": lambda model: convert_opset(model, 23),
    "down": lambda model: convert_opset(model, 18),
}


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph.all_nodes()]


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_the_graph_of_every_family_gives_the_same_answers(family: str, traced: Any):
    before = run(traced(family))
    for title, change in BASICS.items():
        model = traced(family)
        change(model)
        assert names(model) == names(traced(family)), title
        assert largest_difference(before, run(model)) < 1e-5, title
        again = traced(family)
        change(again)
        assert ir.to_proto(again).SerializeToString() == ir.to_proto(model).SerializeToString(), title
    assert opset_of(model) == 18


def test_our_own_operators_are_kept(traced: Any):
    model = traced("bert")
    for change in (fold, simplify):
        change(model)
    assert operators(model).count("Attention") == 2
    assert operators(model).count("Mask") == 1


def test_an_exported_graph_loses_half_of_its_nodes(foreign: Any):
    model = ir.load(foreign("bert"))
    before, answers = Size.of(model), run(model)
    fold(model)
    infer_shapes(model)
    simplify(model)
    after = Size.of(model)
    assert after.nodes < before.nodes / 2
    assert before.metrics(after)["nodes_after_count"] == after.nodes
    assert largest_difference(answers, run(model)) < 1e-5


class TestFold:
    def test_constants_and_shapes(self):
        model = written(f"""{HEADER} g (float[2, N] x) => (float[2, N] y) {{
            two = Constant <value_int: int = 2> ()
            three = Constant <value_int: int = 3> ()
            six = Mul (two, three)
            number = Cast <to: int = 1> (six)
            y = Mul (x, number)
        }}""")
        fold(model)
        assert operators(model) == ["Mul"]
        (value,) = model.graph.initializers.values()
        assert float(value.const_value.numpy()) == 6

    def test_a_constant_is_not_blown_up(self):
        text = f"{HEADER} g (float[4, 4096] x) => (float[4, 4096] y) {{ wide = Expand (w, shape) y = Add (x, wide) }}"
        constants = {"w": np.ones((1, 4096), np.float32), "shape": np.array([4, 4096])}
        model = written(text, **constants)
        fold(model)
        assert operators(model) == ["Expand", "Add"]
        fold(model, limit=4 * 4 * 4096)
        assert operators(model) == ["Add"]

    def test_a_large_constant_may_replace_as_much(self):
        matrix = np.random.default_rng(0).random((128, 64), np.float32)
        model = written(
            f"{HEADER} g (float[2, 128] x) => (float[2, 64] y) {{ t = Transpose (w) y = MatMul (x, t) }}", w=matrix.T
        )
        fold(model)
        assert operators(model) == ["MatMul"]
        assert np.array_equal(next(iter(model.graph.initializers.values())).const_value.numpy(), matrix)

    def test_equal_weights_are_stored_once_and_transposed_twins_too(self):
        table = np.random.default_rng(0).random((32, 8), np.float32)
        text = f"""{HEADER} g (int64[N] ids) => (float[N, 32] y, float[N, 32] z) {{
            x = Gather (a, ids) x2 = Gather (b, ids) s = Add (x, x2) y = MatMul (s, c) z = MatMul (x2, c)
        }}"""
        model = written(text, a=table, b=table.copy(), c=np.ascontiguousarray(table.T))
        answers = run(model, {"ids": np.array([1, 5])})
        before = Size.of(model)
        fold(model)
        assert before.metrics(Size.of(model))["constants_saved_bytes"] == 2 * table.nbytes
        assert operators(model).count("Gather") == 1
        assert largest_difference(answers, run(model, {"ids": np.array([1, 5])})) == 0

    def test_two_outputs_that_are_the_same_keep_their_names(self):
        body = "a = Relu (x) b = Identity (a) c = Relu (x)"
        model = written(f"{HEADER} g (float[2] x) => (float[2] a, float[2] b, float[2] c) {{ {body} }}")
        fold(model)
        assert names(model)[1] == ["a", "b", "c"]
        assert all(np.array_equal(value, [0, 3]) for value in run(model, {"x": np.array([-1, 3], np.float32)}))

    def test_branches_keep_results_of_their_own(self):
        model = written(f"""{HEADER} g (bool flag, float[2] x) => (float[2] y) {{
            outer = Relu (x)
            y = If (flag) <
                then_branch = a () => (float[2] p) {{ p = Identity (outer) }},
                else_branch = b () => (float[2] q) {{ q = Neg (outer) }}>
        }}""")
        for change in (fold, simplify):
            change(model)
        x = np.array([-1, 3], np.float32)
        for flag, expected in ((True, [0, 3]), (False, [0, -3])):
            assert np.array_equal(run(model, {"flag": np.array(flag), "x": x})[0], expected)

    def test_quantized_weights_stay_quantized(self):
        text = f"{HEADER} g (float[2, 8] x) => (float[2, 4] y) {{ w = DequantizeLinear (q, s) y = MatMul (x, w) }}"
        model = written(text, q=np.ones((8, 4), np.int8), s=np.float32(0.5))
        fold(model)
        assert operators(model) == ["DequantizeLinear", "MatMul"]

    def test_chance_is_not_folded(self):
        drawn = "a = RandomUniform <shape = [4]> () b = RandomUniform <shape = [4]> ()"
        model = written(f"{HEADER} g (float[4] x) => (float[4] y) {{ {drawn} c = Add (a, b) y = Add (x, c) }}")
        fold(model)
        assert operators(model).count("RandomUniform") == 2


class TestSimplify:
    @pytest.mark.parametrize(
        ("body", "left"),
        [
            ("a = Transpose <perm = [1, 0, 2]> (x) y = Transpose <perm = [1, 0, 2]> (a)", ["Identity"]),
            ("a = Transpose <perm = [1, 0, 2]> (x) y = Transpose <perm = [2, 0, 1]> (a)", ["Transpose"]),
            ("a = Reshape (x, flat) y = Reshape (a, back)", ["Reshape"]),
            ("a = Cast <to: int = 11> (x) b = Cast <to: int = 1> (a) y = Relu (b)", ["Relu"]),
            ("a = Cast <to: int = 10> (x) b = Cast <to: int = 1> (a) y = Relu (b)", ["Cast", "Cast", "Relu"]),
            ("a = Cast <to: int = 6> (x) b = Cast <to: int = 1> (a) y = Relu (b)", ["Cast", "Cast", "Relu"]),
            ("a = Identity (x) b = Identity (a) y = Relu (b)", ["Relu"]),
            ("a = Mul (x, one) b = Add (a, zero) y = Relu (b)", ["Relu"]),
        ],
    )
    def test_chains(self, body: str, left: list[str]):
        constants = {
            "flat": np.array([2, 12]),
            "back": np.array([2, 3, 4]),
            "one": np.float32(1),
            "zero": np.float32(0),
        }
        used = {name: value for name, value in constants.items() if f" {name})" in body or f", {name})" in body}
        shape = "4, 3, 2" if "[2, 0, 1]" in body else "2, 3, 4"
        shape = "4, 2, 3" if shape == "4, 3, 2" else shape
        model = written(f"{HEADER} g (float[2, 3, 4] x) => (float[A, B, C] y) {{ {body} }}", **used)
        x = np.linspace(-3, 3, 24, dtype=np.float32).reshape(2, 3, 4)
        answers = run(model, {"x": x})
        infer_shapes(model)
        simplify(model)
        assert operators(model) == left
        assert largest_difference(answers, run(model, {"x": x})) == 0

    def test_a_split_into_heads_needs_no_shape_at_run_time(self):
        model = written(
            f"""{HEADER} g (float[batch, sequence, 8] x) => (float[batch, sequence, 2, 4] y) {{
            s = Shape <start = 0, end = 2> (x) t = Concat <axis = 0> (s, heads) y = Reshape (x, t)
        }}""",
            heads=np.array([2, 4]),
        )
        infer_shapes(model)
        simplify(model)
        assert operators(model) == ["Reshape"]
        x = np.ones((3, 5, 8), np.float32)
        assert run(model, {"x": x})[0].shape == (3, 5, 2, 4)


def test_shapes_that_cannot_be_worked_out_are_left_and_nothing_is_written(tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    header = '<ir_version: 10, opset_import: ["" : 20, "com.example" : 1]>'
    body = "a = com.example.Odd (x) b = Relu (x) y = Add (a, b)"
    model = written(f"{header} g (float[N, 4] x) => (float[A, B] y) {{ {body} }}")
    infer_shapes(model)
    odd, relu, _ = model.graph
    assert odd.outputs[0].shape is None
    assert list(relu.outputs[0].shape or ()) == ["N", 4]
    assert not list(tmp_path.iterdir())


class TestFixAxes:
    def test_names_and_sums_of_them_become_numbers(self, traced: Any):
        model = traced("gpt2")
        assert set(input_axes(model)) == {"batch", "sequence", "past_sequence", "total_sequence"}
        fix_axes(model, SIZES)
        fold(model)
        assert input_axes(model) == {}
        assert "Shape" not in operators(model)

    def test_axes_are_found_under_the_exporters_own_names(self, foreign: Any):
        model = ir.load(foreign("bert"))
        assert axis_name(model, "batch") == "batch_size"
        assert axis_name(model, "sequence") == "sequence_length"
        assert axis_name(model, "nothing") is None


class TestConvert:
    def test_gelu_is_written_out_where_there_is_none(self, traced: Any):
        model = traced("bert")
        assert "Gelu" in operators(model)
        convert_opset(model, 17)
        assert "Gelu" not in operators(model)
        assert opset_of(model) == 17
        assert largest_difference(run(traced("bert")), run(model)) < 1e-5

    def test_what_does_not_exist_is_refused_by_name(self):
        model = written(
            f"{HEADER} g (float[2, 4] x) => (float[2, 4] y) {{ y = LayerNormalization (x, s) }}",
            s=np.ones(4, np.float32),
        )
        with pytest.raises(ConversionError, match="LayerNormalization"):
            convert_opset(model, 16)

    def test_a_type_that_came_later_is_refused(self):
        model = written('<ir_version: 10, opset_import: ["" : 21]> g (uint4[4] x) => (uint4[4] y) { y = Identity (x) }')
        with pytest.raises(ConversionError, match="Identity"):
            convert_opset(model, 18)

    def test_other_domains_stay(self):
        header = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>'
        model = written(f"{header} g (float[2] x) => (float[2] y) {{ a = com.microsoft.QuickGelu (x) y = Relu (a) }}")
        answers = run(model, {"x": np.ones(2, np.float32)})
        for version in (23, 18):
            convert_opset(model, version)
            assert largest_difference(answers, run(model, {"x": np.ones(2, np.float32)})) == 0


STEPS = {
    "turn": "Transpose <perm = [1, 0]> ({0})",
    "there": "Reshape ({0}, flat)",
    "square": "Reshape ({0}, square)",
    "same": "Identity ({0})",
    "wide": "Cast <to: int = 11> ({0})",
    "narrow": "Cast <to: int = 1> ({0})",
    "half": "Cast <to: int = 10> ({0})",
    "nothing": "Mul ({0}, one)",
    "shift": "Add ({0}, two)",
    "curve": "Tanh ({0})",
    "all": "Slice ({0}, begin, end)",
}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=12))
def test_any_chain_gives_the_same_answers(steps: list[str]):
    body, current, kind, shape = [], "x", 1, (3, 3)
    for number, step in enumerate(steps):
        if step in ("turn", "all") and len(shape) == 1:
            continue
        if step in ("nothing", "shift", "curve") and kind != 1:
            body.append(f"k{number} = Cast <to: int = 1> ({current})")
            current, kind = f"k{number}", 1
        kind = {"wide": 11, "narrow": 1, "half": 10}.get(step, kind)
        shape = {"there": (9,), "square": (3, 3)}.get(step, shape)
        body.append(f"v{number} = {STEPS[step].format(current)}")
        current = f"v{number}"
    body.append(f"y = Cast <to: int = 1> ({current})")
    constants = {
        "flat": np.array([9]),
        "square": np.array([3, -1]),
        "one": np.float32(1),
        "two": np.float32(2),
        "begin": np.array([0, 0]),
        "end": np.array([9, 9]),
    }
    text = " ".join(body)
    used = {name: value for name, value in constants.items() if f", {name})" in text or f", {name}," in text}
    model = written(f"{HEADER} g (float[3, 3] x) => (float[{', '.join('AB'[: len(shape)])}] y) {{ {text} }}", **used)
    x = {"x": np.linspace(-2, 2, 9, dtype=np.float32).reshape(3, 3)}
    answers = run(model, x)
    infer_shapes(model)
    for change in (fold, simplify, fold):
        change(model)
        assert largest_difference(answers, run(model, x)) == 0
    assert names(model) == (["x"], ["y"])
