"""Sizes of values: working them out, and giving the varying ones a number."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx

_LIGHT = 1024
"""Constants of more elements have no say in a shape and are left out of what is given to a library in C++."""


@contextmanager
def without_weights(model: ir.Model) -> Iterator[onnx.ModelProto]:
    """Have the graph as a protobuf message in which the large constants are inputs, behind its own."""
    graph = model.graph
    kept = dict(graph.initializers)
    count = len(graph.inputs)
    heavy = [value for value in kept.values() if value.const_value is not None and value.const_value.size > _LIGHT]
    heavy = [value for value in heavy if not value.is_graph_input()]
    try:
        for value in heavy:
            graph.initializers.pop(value.name or "")
            graph.inputs.append(value)
        yield ir.to_proto(model)
    finally:
        while len(graph.inputs) > count:  # `del` of a slice would leave them marked as inputs
            graph.inputs.pop()
        graph.initializers.clear()
        graph.initializers.update(kept)


def infer_shapes(model: ir.Model) -> None:
    """Work out types and symbolic sizes of all values, ONNX Runtime's own operators included.

    What ONNX Runtime's library cannot follow onnx's own does, and what neither can is left as it is: shapes are a help
    here, no condition.
    """
    import onnx

    with without_weights(model) as proto:
        plain = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
        try:
            symbolic = ir.from_proto(_inferred(proto))
        except Exception:  # noqa: BLE001 -- whatever its thousand lines of rules raise
            symbolic = plain
    for found, only_missing in ((symbolic, False), (plain, True)):
        for graph, known in zip(model.graphs(), found.graphs(), strict=True):
            by_name = {value.name: value for node in known for value in node.outputs}
            for value in [value for node in graph for value in node.outputs]:
                if (other := by_name.get(value.name)) is not None and not (only_missing and value.shape is not None):
                    _take_over(value, other)


def _take_over(value: ir.Value, other: ir.Value) -> None:
    if value.type is None:
        value.type = other.type
    if other.shape is not None and (value.shape is None or len(value.shape) == len(other.shape)):
        value.shape = other.shape


def _inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Run ONNX Runtime's inference; its own way in writes what it could not finish into the current folder."""
    from onnxruntime.tools import symbolic_shape_infer as library

    library.logger.setLevel(logging.CRITICAL)
    worker: Any = library.SymbolicShapeInference(2**31 - 1, auto_merge=True, guess_output_rank=False, verbose=0)
    worker._preprocess(proto)
    while worker.run_:
        worker._infer_impl()
    worker._update_output_from_vi()
    return worker.out_mp_


def input_axes(model: ir.Model) -> dict[str, list[str]]:
    """Return the names of the varying axes of the inputs, and which inputs have each."""
    names: dict[str, list[str]] = {}
    for value in model.graph.inputs:
        for dimension in value.shape or ():
            if isinstance(dimension, ir.SymbolicDim) and dimension.value is not None and dimension.value.isidentifier():
                names.setdefault(dimension.value, []).append(str(value.name))
    return names


def axis_name(model: ir.Model, wanted: str) -> str | None:
    """Return the graph's own name for an axis; `batch` is the first of the tokens, `sequence` the second."""
    names = input_axes(model)
    if wanted in names or wanted not in ("batch", "sequence"):
        return wanted if wanted in names else None
    place = ("batch", "sequence").index(wanted)
    tokens = [value for value in model.graph.inputs if value.name in ("input_ids", "inputs_embeds")]
    for value in tokens or list(model.graph.inputs):
        dimension = value.shape[place] if value.shape is not None and len(value.shape) > place else None
        if isinstance(dimension, ir.SymbolicDim) and dimension.value is not None:
            return dimension.value
    return None


def fix_axes(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Give named axes a size, wherever the name stands, in sums and products as well."""
    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape([_fixed(dimension, sizes) for dimension in value.shape])


def rename_axes(model: ir.Model, names: Mapping[str, str]) -> None:
    """Give axes another name, where the name stands alone."""
    for value in _values(model):
        if value.shape is not None:
            renamed = [
                names.get(str(dimension.value), dimension) if isinstance(dimension, ir.SymbolicDim) else dimension
                for dimension in value.shape
            ]
            value.shape = ir.Shape(renamed)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        for node in graph:
            yield from node.outputs


def _fixed(dimension: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int | ir.SymbolicDim:
    if isinstance(dimension, int) or dimension.value is None:
        return dimension
    if dimension.value in sizes:
        return sizes[dimension.value]
    try:
        return dimension.evaluate(sizes)
    except (ValueError, TypeError, SyntaxError):  # a name such as `batch-size:0` is no expression
        return dimension
