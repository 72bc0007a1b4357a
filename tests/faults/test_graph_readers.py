"""ONNX files that others wrote: damaged bytes, hostile fields, and graphs that would run for ever."""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hostile import NUMBERS, TEXTS, damaged, hammer, memory_limit, time_limit
from hypothesis import strategies as st
from llmopt.core.errors import LlmoptError

SMALL, GIB = 1 << 28, 1 << 30


def function(name: str, *calls: str) -> Any:
    """Return a function of the domain `own` that calls others, one after another."""
    import onnx
    from onnx import helper

    nodes = [helper.make_node(call, [f"v{at}"], [f"v{at + 1}"], domain="own") for at, call in enumerate(calls)]
    nodes = nodes or [helper.make_node("Neg", ["v0"], ["v1"])]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    made: onnx.FunctionProto = helper.make_function("own", name, ["v0"], [f"v{len(nodes)}"], nodes, opsets)
    return made


def loop(body: list[Any], name: str = "trips") -> Any:
    """Return a Loop over nodes that read and make `carried`."""
    from onnx import TensorProto, helper

    flag, number = TensorProto.BOOL, TensorProto.INT64
    inputs = [("i", number, []), ("go", flag, []), ("carried", TensorProto.FLOAT, None)]
    outputs = [("on", flag, []), ("carries", TensorProto.FLOAT, None)]
    inner = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), *body],
        "body",
        [helper.make_tensor_value_info(*one) for one in inputs],
        [helper.make_tensor_value_info(*one) for one in outputs],
    )
    return helper.make_node("Loop", [name, "", "x"], ["y"], body=inner)


def model(nodes: list[Any], *, trips: int | None = 3, functions: Any = (), weights: bool = False) -> Any:
    """Return a model from x to y, with a number `trips` among its weights."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    tensors = [] if trips is None else [numpy_helper.from_array(np.array(trips, np.int64), "trips")]
    if weights:
        tensors += [numpy_helper.from_array(np.ones((4, 4), np.float32), "inside")]
        outside = TensorProto(name="outside", data_type=TensorProto.FLOAT, dims=[64, 4], data_location=1)
        for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", "1024")):
            outside.external_data.add(key=key, value=value)
        tensors.append(outside)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, functions=list(functions), opset_imports=opsets, ir_version=10)


def ordinary() -> Any:
    """Return a model with all that is read: weights inside and outside, a loop, a function, a branch, a constant."""
    from onnx import helper

    step = helper.make_node("twice", ["carried"], ["carries"], domain="own")
    nodes = [
        loop([step]),
        helper.make_node("Constant", [], ["c"], value_float=1.0),
        helper.make_node("Constant", [], ["empty"], value_floats=[1.0, 2.0]),
    ]
    return model(nodes, functions=[function("once"), function("twice", "once", "once")], weights=True)


def edited(proto: Any, number: int) -> bytes:
    """Return a model's bytes after one to four of its fields were given hostile values."""
    dice, made = Random(number), type(proto)()
    made.CopyFrom(proto)
    for _ in range(dice.randint(1, 4)):
        _edit(dice, made)
    return made.SerializePartialToString()


def _edit(dice: Random, message: Any) -> None:
    """Descend to some field and change it."""
    fields = [field for field, _ in message.ListFields()] or list(message.DESCRIPTOR.fields)
    field = dice.choice(fields if dice.random() < 0.85 else list(message.DESCRIPTOR.fields))
    many, value = field.is_repeated, getattr(message, field.name)
    if many and len(value) and dice.random() < 0.15:
        del value[dice.randrange(len(value)) :]
    elif field.message_type is not None:
        if many and (not len(value) or dice.random() < 0.2):
            value.add() if not len(value) else value.add().CopyFrom(dice.choice(value))
        else:
            _edit(dice, dice.choice(value) if many else value)
    elif many:
        value.extend([_scalar(dice, field)] * dice.choice((1, 1, 1, 300)))
    else:
        setattr(message, field.name, _scalar(dice, field))


def _scalar(dice: Random, field: Any) -> Any:
    numbers = [number for number in NUMBERS if isinstance(number, int)]
    if field.enum_type is not None:
        return dice.choice(field.enum_type.values).number
    if field.cpp_type == field.CPPTYPE_INT32:
        return dice.choice((0, -1, 1, 7, 23, 99, (1 << 31) - 1))
    if field.cpp_type == field.CPPTYPE_STRING:
        texts = [*TEXTS, *map(str, numbers), "weights.bin", "model.onnx", "offset", "length", "location", "Loop", "own"]
        text = dice.choice(texts).encode("utf-8", "replace")
        return text if field.type == field.TYPE_BYTES else text.decode()
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return float(dice.choice((0, -1, 1e30, float("nan"))))
    if field.cpp_type in (field.CPPTYPE_UINT64, field.CPPTYPE_UINT32):
        return dice.choice((0, 1, (1 << 32) - 1))
    return dice.choice([number for number in numbers if -(1 << 63) <= number < 1 << 63])


BOMBS = ("a-billion-times", "loop-in-loop", "for-ever", "as-it-likes", "functions-that-double", "functions-in-a-ring")
BOMBS += ("graphs-in-graphs", "too-many-nodes")


def write(folder: Path, data: bytes) -> Path:
    (folder / "weights.bin").write_bytes(bytes(1024))
    (folder / "model.onnx").write_bytes(data)
    return folder / "model.onnx"


def test_onnx_files(tmp_path: Path):
    from llmopt.models.locate import Location
    from llmopt.models.onnx_file import external_tensors, graph_outline, open_graph

    proto = ordinary()
    write(tmp_path, b"")

    def read(raw: bytes) -> None:
        path = tmp_path / "model.onnx"
        path.write_bytes(raw)
        for tensor in external_tensors(open_graph(path)):
            assert (tmp_path / str(tensor.location)).resolve().parent == tmp_path.resolve()
        graph_outline(Location(tmp_path, "x", graph=path))

    read(proto.SerializeToString())
    hammer(st.integers(0, 1 << 64).map(lambda number: edited(proto, number)) | damaged(proto.SerializeToString()), read)


def neg() -> Any:
    from onnx import helper

    return helper.make_node("Neg", ["carried"], ["carries"])


def bombs() -> dict[str, tuple[Any, str]]:
    """Return graphs that are small, and would take for ever or all memory."""
    from onnx import helper

    doubling = [function("f0"), *(function(f"f{at}", *[f"f{at - 1}"] * 10) for at in range(1, 12))]
    rings = [function("f0", "f1"), function("f1", "f0")]
    inner = loop([neg()])
    inner.input[2], inner.output[0] = "carried", "carries"
    deep = neg()
    for _ in range(20):
        deep = loop([deep])
        deep.input[2], deep.output[0] = "carried", "carries"
    deep.input[2], deep.output[0] = "x", "y"
    call = helper.make_node("f11", ["x"], ["y"], domain="own")
    many = [helper.make_node("Neg", ["x"], ["y"])] * 450_000
    return {
        "a-billion-times": (model([loop([neg()])], trips=10**9), "loops or functions repeat too often"),
        "loop-in-loop": (model([loop([inner])], trips=40_000), "loops or functions repeat too often"),
        "for-ever": (model([loop([neg()], "")], trips=None), "no fixed number of repetitions"),
        "as-it-likes": (model([loop([neg()], "x")], trips=None), "no fixed number of repetitions"),
        "functions-that-double": (model([call], functions=doubling), "repeat"),
        "functions-in-a-ring": (
            model([helper.make_node("f0", ["x"], ["y"], domain="own")], functions=rings),
            "calls itself",
        ),
        "graphs-in-graphs": (model([deep], trips=1), "levels deep"),
        "too-many-nodes": (model(many), "more than 400000 nodes"),
    }


@pytest.mark.parametrize("opens", ["model", "artifact"])
@pytest.mark.parametrize("name", BOMBS)
def test_graphs_that_would_run_for_ever(tmp_path: Path, name: str, opens: str):
    from llmopt.models.onnx_file import open_graph
    from llmopt.runtimes.onnxruntime_ import OnnxRuntime

    proto, why = bombs()[name]
    path = write(tmp_path, proto.SerializeToString())
    del proto
    with memory_limit(GIB), time_limit(30), pytest.raises(LlmoptError, match="is damaged") as caught:
        open_graph(path) if opens == "model" else OnnxRuntime().open(tmp_path)
    assert why in str(caught.value.where)


def test_a_loop_with_an_end_is_opened(tmp_path: Path):
    from llmopt.models.onnx_file import open_graph

    assert len(open_graph(write(tmp_path, ordinary().SerializeToString())).graph) == 3


def packed(number: int, payload: bytes) -> bytes:
    """Return a field of protobuf with bytes."""
    length, made = len(payload), b""
    while length >= 128:
        made, length = made + bytes([length & 127 | 128]), length >> 7
    key = number << 3 | 2
    return bytes([key & 127 | 128, key >> 7] if key > 127 else [key]) + made + bytes([length]) + payload


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (packed(7, packed(1, b"") * 20_000_000), "nodes"),
        (packed(7, packed(13, packed(2, packed(1, packed(2, packed(1, b"") * 9_000_000))))), "parts"),
        (packed(7, packed(1, packed(5, b"\x40\x01" * 9_000_000))), "parts"),
        (packed(7, packed(5, packed(1, b"\x7f" * 4_000_000))), "dimensions"),
        (packed(7, packed(1, packed(1, b"x" * 1_000_000))), "a name takes"),
        (packed(7, b"") + packed(7, b""), "2 graphs"),
        (packed(20, b""), "training"),
        (b"\xff" * 100, "no message"),
        (struct.pack("<Q", 1 << 63), "no message"),
        (b"", "empty"),
    ],
    ids=["nodes", "shapes", "integers", "dimensions", "name", "two-graphs", "training", "ones", "length", "empty"],
)
def test_files_that_libraries_would_make_much_of(tmp_path: Path, data: bytes, why: str):
    from llmopt.models.onnx_file import open_graph

    path = write(tmp_path, data)
    with memory_limit(SMALL), time_limit(60), pytest.raises(LlmoptError, match="is damaged") as caught:
        open_graph(path)
    assert why in str(caught.value.where)


def test_values_stored_as_those_of_another_type(tmp_path: Path):
    from llmopt.models.onnx_file import open_graph

    proto = ordinary()
    inside = next(one for one in proto.graph.initializer if one.name == "inside")
    inside.ClearField("raw_data")
    inside.uint64_data.extend([1] * 16)
    with pytest.raises(LlmoptError, match="is damaged") as caught:
        open_graph(write(tmp_path, proto.SerializeToString()))
    assert "those of another type" in str(caught.value.where)
