"""Running a graph in ONNX Runtime on inputs made up from its own description."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from llmopt.graphs.attention import spell_out

SIZES = {
    "batch": 2,
    "batch_size": 2,
    "sequence": 5,
    "sequence_length": 5,
    "past_sequence": 3,
    "total_sequence": 8,
    "decoder_sequence": 4,
}
PADDED = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def feeds(session: Any) -> dict[str, Any]:
    """Return inputs; the second text is padded where the graph has a mask without a past."""
    generator = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for value in session.get_inputs():
        names = [size if isinstance(size, int) else str(size) for size in value.shape]
        shape = [
            size if isinstance(size, int) else SIZES.get(size, (2, 5, 5, 5)[place]) for place, size in enumerate(names)
        ]
        kind = np.int64 if "int64" in value.type else np.float32
        if value.name.endswith("input_ids"):
            made[value.name] = generator.integers(3, 200, shape)
        elif value.name == "attention_mask":
            made[value.name] = PADDED if shape == [2, 5] else np.ones(shape, kind)
        else:
            made[value.name] = generator.random(shape).astype(kind)
    return made


def run(model: ir.Model, given: dict[str, Any] | None = None) -> list[Any]:
    """Return the outputs of a copy of the graph, written in standard operators."""
    copy = model.clone()
    spell_out(copy)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(copy).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds(session) if given is None else given)


def largest_difference(first: list[Any], second: list[Any]) -> float:
    """Return the largest difference of any two outputs, which must have the same shapes."""
    assert [one.shape for one in first] == [two.shape for two in second]
    assert all(np.isfinite(one).all() for one in second)
    return max(float(np.abs(one.astype(np.float64) - two).max()) for one, two in zip(first, second, strict=True))


def names(model: ir.Model) -> tuple[list[Any], list[Any]]:
    """Return the names of inputs and outputs."""
    return [value.name for value in model.graph.inputs], [value.name for value in model.graph.outputs]


def written(text: str, **constants: Any) -> ir.Model:
    """Return a graph from onnx's text format, with initializers."""
    import onnx
    from onnx import numpy_helper

    proto = onnx.parser.parse_model(text)
    for name, array in constants.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return ir.from_proto(proto)
