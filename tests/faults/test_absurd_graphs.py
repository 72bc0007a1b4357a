"""ONNX files of a few bytes whose values would fill any memory, and weights that are not as large as they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hostile import memory_limit, time_limit
from llmopt.core.errors import LlmoptError
from llmopt.core.recipe import ModelSpec
from llmopt.graphs.extents import check_extents
from llmopt.graphs.limits import check_graph_file
from llmopt.models.locate import locate
from llmopt.models.onnx_file import graph_outline
from llmopt.pipeline.artifact import open_artifact
from onnx import TensorProto, helper, numpy_helper

HUGE = 1 << 20
INTEGERS = {"huge": [HUGE, HUGE], "wide": [1 << 40, 4], "pads": [0, 0, HUGE, HUGE], "sizes": [1, 1, HUGE, HUGE]}
NUMBERS = {"zero": 0, "end": 1 << 40, "one": 1}
FLOATS = {"row": np.ones((1, 4)), "image": np.ones((1, 1, 2, 2)), "values": np.array([0, 1])}


def node(kind: str, *inputs: str, **attributes: Any) -> Any:
    return helper.make_node(kind, list(inputs), ["y"], **attributes)


ABSURD = {
    "zeros": [node("ConstantOfShape", "huge")],
    "expand": [node("Expand", "row", "wide")],
    "expand-input": [node("Expand", "x", "wide")],
    "tile": [node("Tile", "row", "huge")],
    "range": [node("Range", "zero", "end", "one")],
    "resize": [node("Resize", "image", "", "", "sizes")],
    "pad": [node("Pad", "row", "pads")],
    "random": [node("RandomNormal", shape=[HUGE, HUGE])],
    "one-hot": [node("OneHot", "huge", "end", "values")],
    "made": [helper.make_node("Mul", ["huge", "huge"], ["shape"]), node("ConstantOfShape", "shape")],
    "constant": [helper.make_node("Constant", [], ["c"], value_ints=[HUGE, HUGE]), node("ConstantOfShape", "c")],
    "many": [
        helper.make_node("Constant", [], ["c"], value_ints=[1 << 16, 1 << 15]),
        *(helper.make_node("ConstantOfShape", ["c"], [f"y{number}"]) for number in range(8)),
        node("Sum", *(f"y{number}" for number in range(8))),
    ],
}


def save(path: Path, nodes: list[Any], *more: Any) -> Path:
    """Write a graph that has all constants from above."""
    arrays = {name: np.array(value, np.int64) for name, value in (INTEGERS | NUMBERS).items()}
    arrays |= {name: value.astype(np.float32) for name, value in FLOATS.items()}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    tensors = [*(numpy_helper.from_array(value, name) for name, value in arrays.items()), *more]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize("name", ABSURD)
def test_a_graph_of_terabytes_is_refused_before_the_engine_sees_it(name: str, tmp_path: Path):
    path = save(tmp_path / "model.onnx", ABSURD[name])
    assert path.stat().st_size < 2048
    location = locate(ModelSpec(id=str(path)))
    for read in (lambda: graph_outline(location), lambda: open_artifact(str(tmp_path))):
        with memory_limit(1 << 30), time_limit(10), pytest.raises(LlmoptError, match="more than a machine holds"):
            read()


def test_what_fits_is_let_through(tmp_path: Path):
    weights = numpy_helper.from_array(np.ones((4, 512), np.float32), "weights")
    nodes = [
        helper.make_node("Transpose", ["weights"], ["turned"]),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Expand", ["row", "shape"], ["rows"]),
        helper.make_node("Add", ["x", "rows"], ["sum"]),
        node("MatMul", "sum", "weights"),
    ]
    path = save(tmp_path / "model.onnx", nodes, weights)
    check_graph_file(path)
    check_extents(path)
    assert graph_outline(locate(ModelSpec(id=str(path)))).parameters > 2048


def tensor(kind: int, dims: list[int], **fields: Any) -> Any:
    return onnx.TensorProto(name="w", data_type=kind, dims=dims, **fields)


@pytest.mark.parametrize(
    "weights",
    [
        tensor(TensorProto.FLOAT, [HUGE, HUGE], raw_data=bytes(4)),
        tensor(TensorProto.FLOAT, [1], raw_data=bytes(8)),
        tensor(TensorProto.FLOAT, [HUGE, HUGE], float_data=[1.0]),
        tensor(TensorProto.INT64, [HUGE, HUGE], int64_data=[1, 2]),
        tensor(TensorProto.FLOAT16, [HUGE]),
        tensor(TensorProto.INT4, [5], raw_data=bytes(4)),
    ],
    ids=["raw", "raw-long", "floats", "integers", "nothing", "half-bytes"],
)
def test_weights_that_are_not_as_large_as_they_say_are_refused(weights: Any, tmp_path: Path):
    path = save(tmp_path / "model.onnx", [node("Identity", "x")], weights)
    with memory_limit(1 << 30), time_limit(10), pytest.raises(LlmoptError, match="is damaged") as refused:
        check_graph_file(path)
    assert "by its shape" in str(refused.value.where)


@pytest.mark.parametrize(
    "weights",
    [
        tensor(TensorProto.INT4, [5], raw_data=bytes(3)),
        tensor(TensorProto.INT4, [4], int32_data=[1, 2]),
        tensor(TensorProto.BOOL, [2], int32_data=[0, 1]),
        tensor(TensorProto.FLOAT, [0], raw_data=b""),
        tensor(TensorProto.FLOAT, [0, 4]),
        tensor(TensorProto.INT64, [], int64_data=[7]),
        tensor(TensorProto.STRING, [2], string_data=[b"a", b""]),
    ],
    ids=["half-bytes", "packed", "flags", "empty", "none", "scalar", "texts"],
)
def test_weights_of_every_kind_are_let_through(weights: Any, tmp_path: Path):
    check_graph_file(save(tmp_path / "model.onnx", [node("Identity", "x")], weights))
