"""Finding the products of an ONNX graph that have a constant matrix: the places where weights are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]

Key = tuple[int, int, bool]
"""The constant, its place where it is one of a stack, and whether its rows are outputs."""


@dataclass(frozen=True, slots=True)
class Product:
    """A node that multiplies its first input by a constant matrix.

    Attributes:
        node: the MatMul or Gemm.
        key: says which matrix it is: two products with one key share it.
        dtype: of the matrix, as ONNX names it ("FLOAT").
        matrix: reads the matrix, (out, in).
        bias: added to the product.
    """

    node: ir.Node
    key: Key
    dtype: str
    matrix: Callable[[], Array]
    bias: ir.Value | None


def products(model: ir.Model) -> Iterator[Product]:
    """Yield the products with a constant matrix, those inside loops and branches included.

    1. MatMul by an (in, out) matrix.
    2. Gemm by an (in, out) matrix, or (out, in) with transB, with or without a bias.
    3. Either, where a Transpose stands between.
    4. Either, where the matrix is one of a stack, (experts, in, out), that a Split takes apart.
    """
    for node in list(model.graph.all_nodes()):
        if len(node.inputs) < 2 or node.inputs[1] is None or node.domain != "":
            continue
        by_rows = False
        if node.op_type == "Gemm":
            if not _is_plain(node):
                continue
            by_rows = bool(node.attributes.get_int("transB", 0))
        elif node.op_type != "MatMul":
            continue
        if (source := _source(node.inputs[1], by_rows=by_rows)) is not None:
            yield Product(node, *source, node.inputs[2] if len(node.inputs) > 2 else None)


def constant(value: ir.Value) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer or of a Constant node."""
    import onnx_ir as ir

    return ir.convenience.get_const_tensor(value)


def _is_plain(gemm: ir.Node) -> bool:
    attributes = gemm.attributes
    scaled = attributes.get_float("alpha", 1.0) != 1.0 or attributes.get_float("beta", 1.0) != 1.0
    return not scaled and not attributes.get_int("transA", 0)


def _source(value: ir.Value, *, by_rows: bool) -> tuple[Key, str, Callable[[], Array]] | None:
    """Return key, dtype and reader of the constant matrix behind a value, None if there is none."""
    tensor = constant(value)
    if tensor is not None:
        if len(tensor.shape) != 2:
            return None
        return (id(value), 0, by_rows), str(tensor.dtype), lambda: _rows(tensor.numpy(), by_rows=by_rows)
    producer = value.producer()
    if producer is None or not producer.inputs or producer.inputs[0] is None:
        return None
    if producer.op_type == "Transpose":
        return _source(producer.inputs[0], by_rows=not by_rows)
    split = producer.inputs[0].producer()
    if producer.op_type not in ("Squeeze", "Reshape") or split is None or split.op_type != "Split":
        return None
    stack = None if split.inputs[0] is None else constant(split.inputs[0])
    ones = stack is not None and len(stack.shape) == 3 and len(split.outputs) == stack.shape[0]
    if stack is None or not ones or split.attributes.get_int("axis", 0) != 0:
        return None
    place = list(split.outputs).index(producer.inputs[0])
    return (id(split.inputs[0]), place, by_rows), str(stack.dtype), lambda: _rows(stack.numpy()[place], by_rows=by_rows)


def _rows(stored: Array, *, by_rows: bool) -> Array:
    import numpy as np

    return np.ascontiguousarray(stored if by_rows else stored.T)
