"""Finding a GELU that is spelled out with tanh: what is computed is told by trial, not by its spelling.

Hendrycks and Gimpel, Gaussian Error Linear Units, 2016:

    x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .nodes import CONTRIB, Builder, constant, nodes_of, replace
from .opsets import opset_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import onnx_ir as ir

    Array = np.ndarray[Any, Any]

_DOWN, _UP = 4, 6
"""How many nodes may stand behind the tanh, and in front of it."""

_STANDARD = 20
_TRIED = np.linspace(-6, 6, 97)
_OPERATORS: Mapping[str, Callable[..., Array]] = {
    "Add": np.add,
    "Div": np.divide,
    "Mul": np.multiply,
    "Pow": np.power,
    "Sub": np.subtract,
    "Tanh": np.tanh,
}


def fuse_tanh_gelus(model: ir.Model) -> int:
    """Put one node in the place of each, in place, and return how many there were."""
    count = 0
    for node in nodes_of(model, "Tanh"):
        found = next(((start, end) for end in _behind(node) for start in _before(node) if _is_gelu(start, end)), None)
        if found is None:
            continue
        start, end = found
        maker = end.producer()
        assert maker is not None
        builder = Builder(maker)
        if opset_of(model) >= _STANDARD:
            made = builder.op("Gelu", start, shape=end.shape, approximate="tanh")
        else:
            made = builder.op("FastGelu", start, domain=CONTRIB, shape=end.shape)
            model.opset_imports.setdefault(CONTRIB, 1)
        replace(end, made)
        count += 1
    RemoveUnusedNodesPass()(model)
    return count


def _behind(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what is made of a node's output, one node after the other."""
    for _ in range(_DOWN):
        users = list(node.outputs[0].consumers())
        if len(users) != 1 or users[0].op_type not in _OPERATORS:
            return
        node = users[0]
        yield node.outputs[0]


def _before(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what a node's input is made of, the nearest first."""
    level = [node]
    for _ in range(_UP):
        values = [value for each in level for value in each.inputs if value is not None and constant(value) is None]
        yield from dict.fromkeys(values)
        level = [maker for value in values if (maker := value.producer()) and maker.op_type in _OPERATORS]


def _is_gelu(start: ir.Value, end: ir.Value) -> bool:
    with np.errstate(all="ignore"):
        got = _value(end, start, _DOWN + _UP)
    expected = _TRIED / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (_TRIED + 0.044715 * _TRIED**3)))
    return got is not None and bool(np.allclose(got, expected, rtol=0, atol=1e-5))


def _value(value: ir.Value, start: ir.Value, depth: int) -> Array | None:
    """Return a value as a function of `start` at the numbers that are tried, None if it depends on anything else."""
    if value is start:
        return _TRIED
    number = constant(value)
    if number is not None:
        return np.asarray(number, np.float64).reshape(()) if number.size == 1 else None
    node = value.producer()
    if node is None or node.domain or node.op_type not in _OPERATORS or not depth:
        return None
    parts = [_value(part, start, depth - 1) for part in node.inputs if part is not None]
    return None if any(part is None for part in parts) else _OPERATORS[node.op_type](*parts)
