"""8-bit scores: queries and keys of attention on levels, which OpenVINO then multiplies as integers.

    QuantizeLinear(query or key) -> DequantizeLinear -> …

Both are signed and symmetric, with one fixed range each. They are rounded where they are made, before they are scaled,
turned or gathered: there the rounding costs least, and what is moved afterwards is a quarter of the bytes. ONNX Runtime
has no kernel that multiplies them so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from .attention import ATTENTION, attentions
from .nodes import Builder, constant

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .int8 import Range

    Array = np.ndarray[Any, Any]

_LEVEL = 127


@dataclass(frozen=True, slots=True)
class Int8Scores:
    """The scores of an attention, however many nodes compute them.

    Attributes:
        name: `attention.N`, in the order of the graph.
        query: where the queries are made.
        key: where the keys are made.
    """

    name: str
    query: ir.Value
    key: ir.Value

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """What is multiplied."""
        return self.query, self.key

    def error(self, rows: Mapping[ir.Value, Array], ranges: Mapping[ir.Value, Range]) -> float:
        """Return the squared error of the scores in 8 bits over their square, if the two roundings are independent."""
        return sum(_error(rows[value], _step(ranges[value])) for value in self.inputs)


def scores(model: ir.Model) -> list[Int8Scores]:
    """Return the attentions of the graph whose queries and keys are made by something else."""
    found: dict[tuple[ir.Value, ir.Value], Int8Scores] = {}
    for attention in attentions(model):
        query, key = _origin(attention.query), _origin(attention.key)
        if query is not key and attention.node.graph is model.graph and "" not in (query.name or "", key.name or ""):
            found.setdefault((query, key), Int8Scores(f"attention.{len(found)}", query, key))
    return list(found.values())


def quantize_scores(model: ir.Model, chosen: Sequence[Int8Scores], ranges: Mapping[ir.Value, Range]) -> None:
    """Round queries and keys, in place."""
    for value in dict.fromkeys(value for one in chosen for value in one.inputs):
        users = [(user, place) for user, place in value.uses() if _passes(user) or user.op_type == ATTENTION]
        builder = Builder(users[0][0])
        scale, zero = builder.constant(_step(ranges[value]), np.float32), builder.constant(np.int8(0), np.int8)
        codes = builder.op("QuantizeLinear", value, scale, zero, dtype=ir.DataType.INT8)
        rounded = builder.op("DequantizeLinear", codes, scale, zero, dtype=ir.DataType.FLOAT)
        rounded.shape = value.shape
        for user, place in users:
            user.replace_input_with(place, rounded)
    model.graph.sort()


def _origin(value: ir.Value) -> ir.Value:
    """Return the value that another one is but for its scale, its shape and the order of its rows."""
    while not value.is_graph_output():
        node = value.producer()
        source = node.inputs[0] if node is not None and _passes(node) else None
        if source is None or not all(place == 0 and _passes(user) for user, place in source.uses()):
            break
        value = source
    return value


def _passes(node: ir.Node) -> bool:
    """Return whether a node gives its first input, scaled or with its elements elsewhere."""
    if node.domain:
        return False
    if node.op_type == "Mul":
        factor = constant(node.inputs[1])
        return factor is not None and factor.size == 1
    if node.op_type == "Gather":
        return constant(node.inputs[0]) is None
    return node.op_type in {"Reshape", "Squeeze", "Transpose", "Unsqueeze"}


def _step(span: Range) -> np.float32:
    """Return the distance of two levels, 0 being one of them."""
    return np.float32(max(-span.low, span.high) / _LEVEL) or np.float32(1)


def _error(values: Array, step: np.float32) -> float:
    rounded = np.clip(np.rint(values / step), -_LEVEL - 1, _LEVEL) * step
    return float(np.square(rounded - values).sum() / max(float(np.square(values).sum()), 1e-30))
