"""Reading and writing the nodes of an ONNX graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterable

    Array = np.ndarray[Any, Any]

CONTRIB = "com.microsoft"

_ONE_INPUT = """
    Abs Cast Ceil Clip Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity IsNaN LeakyRelu Log Mish
    Neg Not Reciprocal Relu Round Selu Sigmoid Sign Silu Softplus Softsign Sqrt Swish Tanh FastGelu
    QuickGelu
"""
_ALL_INPUTS = """
    Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mod Mul Or Pow Sub Where
"""
UNARY, BROADCASTING = (frozenset(names.split()) for names in (_ONE_INPUT, _ALL_INPUTS))
"""Operators that treat the numbers of their first input one by one, and those that do so with all their inputs."""


def made_by(value: ir.Value | None, operator: str, domain: str = "") -> ir.Node | None:
    """Return the node that makes `value` if it is an `operator` of `domain`."""
    node = value.producer() if value is not None else None
    return node if node is not None and (node.op_type, node.domain) == (operator, domain) else None


def constant(value: ir.Value | None) -> Array | None:
    """Return `value` as an array if it is an initializer, or the output of a Constant node."""
    if value is None:
        return None
    tensor = value.const_value
    if tensor is None and made_by(value, "Constant") is not None:
        tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or (value.is_graph_input() and not value.is_initializer()):
        return None
    return tensor.numpy()


def size(value: ir.Value | None, axis: int) -> int | None:
    """Return the size of `value` along `axis` where it is known."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    dimension = value.shape[axis]
    return dimension if isinstance(dimension, int) else None


def permutation(node: ir.Node) -> list[int]:
    """Return the order of a Transpose."""
    return list(node.attributes.get_ints("perm", []))


def replace(old: ir.Value, new: ir.Value) -> None:
    """Have every user of `old` read `new`, which takes over its type, and its name if it is an output of the graph."""
    if new.type is None:
        new.type = old.type
    if new.shape is None:
        new.shape = old.shape
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}_replaced"
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name = name
    else:
        old.replace_all_uses_with(new)


class Builder:
    """Puts new nodes in front of a node.

    Args:
        before: the node.
    """

    def __init__(self, before: ir.Node) -> None:
        assert before.graph is not None
        self.before = before
        self.graph = before.graph

    def op(
        self,
        operator: str,
        *inputs: ir.Value | None,
        domain: str = "",
        dtype: ir.DataType | None = None,
        shape: Iterable[Any] | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Add a node and return its only output."""
        return self.ops(operator, *inputs, domain=domain, outputs=1, dtype=dtype, shape=shape, **attributes)[0]

    def ops(
        self,
        operator: str,
        *inputs: ir.Value | None,
        outputs: int,
        domain: str = "",
        dtype: ir.DataType | None = None,
        shape: Iterable[Any] | None = None,
        **attributes: Any,
    ) -> list[ir.Value]:
        """Add a node and return its outputs: `dtype` is that of all, by default an input's, `shape` the first's."""
        node = ir.node(operator, inputs, attributes=attributes, domain=domain, num_outputs=outputs)
        if dtype is None:
            dtype = next((value.dtype for value in inputs if value is not None), None)
        for value in node.outputs:
            if dtype is not None:
                value.dtype = dtype
        if shape is not None:
            node.outputs[0].shape = ir.Shape(list(shape))
        self.graph.insert_before(self.before, node)
        return list(node.outputs)

    def constant(self, values: Any, dtype: Any = np.int64) -> ir.Value:
        """Return an initializer with these values; equal ones become one when the graph is tidied."""
        return initializer(self.graph, "constant", np.asarray(values, dtype))


def initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """Add an initializer, under a name of its own that begins with `name`."""
    unique, count = name, 1
    while unique in graph.initializers:
        count += 1
        unique = f"{name}.{count}"
    value = ir.Value(name=unique, const_value=ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=unique))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    graph.register_initializer(value)
    return value


def nodes_of(model: ir.Model, operator: str, domain: str = "") -> list[ir.Node]:
    """Return the nodes of an operator, those of inner graphs included, listed before anything is changed."""
    return [node for node in model.graph.all_nodes() if (node.op_type, node.domain) == (operator, domain)]
