"""How large the values of a graph get whatever it is fed: a few bytes of shape make terabytes of zeros.

onnx's own inference works out the sizes, shapes computed from constants included. What it cannot follow (a shape
made by Pow) and what depends on the inputs has no size here, and is left to the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import LlmoptError

if TYPE_CHECKING:
    import onnx

MAX_ELEMENTS = 1 << 32
"""Of one value, and of all that are computed from constants beyond `_FOLDS` times those: engines fold these when they
load. 16 GiB in float32; the logits of 8192 tokens and 256,000 words are half of that."""

_FOLDS = 8
_SMALL = 1 << 10


def check_extents(path: Path) -> None:
    """Refuse an ONNX file that `check_graph_file` has let through, if a value of it is absurdly large.

    Raises:
        LlmoptError: it names the value.
    """
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import shape_inference

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        hint = "fetch or export the graph again"
        raise LlmoptError(f"`{path.name}` is damaged", where=f"{path}\n{str(error)[:300]}", hint=hint) from None
    stored = sum(map(_without_numbers, model.graph.initializer))
    try:
        model = shape_inference.infer_shapes(model, data_prop=True)
    except (shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError):
        return  # it loads nowhere: the engine infers with the same library before it does anything else
    constants = {one.name for one in model.graph.initializer}
    total = _FOLDS * stored + MAX_ELEMENTS
    for name, size in _sizes(model.graph, constants):
        total -= size if name in constants else 0
        if size > MAX_ELEMENTS or total < 0:
            raise LlmoptError(
                f"`{path.name}` computes more than a machine holds",
                where=f"{path}\n`{name[:100]}` has {min(size, 1 << 64)} elements or more, whatever the graph is fed",
                hint="fetch or export the graph again",
            )


def _without_numbers(tensor: onnx.TensorProto) -> int:
    """Take the numbers out of a weight, which inference would copy, and return how many elements it has."""
    count = prod(tensor.dims)
    if count > _SMALL:
        name, kind, dims = tensor.name, tensor.data_type, list(tensor.dims)
        tensor.Clear()
        tensor.name, tensor.data_type, tensor.data_location = name, kind, tensor.EXTERNAL
        tensor.dims.extend(dims)
    return count


def _sizes(graph: onnx.GraphProto, constants: set[str]) -> Iterator[tuple[str, int]]:
    """Yield each computed value with its elements, axes that vary counted as one; add to `constants` those that are."""
    shapes = {one.name: one.type.tensor_type.shape for one in (*graph.value_info, *graph.output)}
    numbers = {one.name: one for one in graph.initializer}
    for node in graph.node:
        inner = [each for one in node.attribute for each in (one.g, *one.graphs) if each.node]
        for each in inner:
            yield from _sizes(each, constants | {one.name for one in each.initializer})
        if not inner and all(name in constants for name in node.input if name):
            constants.update(node.output)
        for name in node.output:
            if name in shapes:
                yield name, prod(max(1, axis.dim_value) for axis in shapes[name].dim)
        if node.op_type == "Range" and not node.domain and node.output:
            yield node.output[0], _steps(node, numbers)


def _steps(node: onnx.NodeProto, numbers: Mapping[str, Any]) -> int:
    """Return how many numbers a Range makes, which inference leaves open; 0 where its bounds are not constant."""
    from onnx import numpy_helper

    if not all(name in numbers for name in node.input):
        return 0
    try:
        start, limit, delta = (float(numpy_helper.to_array(numbers[name]).item()) for name in node.input)
        return max(0, int((limit - start) / delta))
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return 0  # no numbers, which the engine refuses
