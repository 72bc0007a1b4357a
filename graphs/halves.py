"""A graph in float16, but for the nodes that need more (graphs/half_limits.py)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass, RemoveUnusedNodesPass

from .half_limits import FULL, HALF, LARGEST, formal_type, half_variables, is_float, nodes_in_full
from .kernels import schema_of
from .nodes import constant, initializer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Array = np.ndarray[Any, Any]

_MASK, _HIDES = -LARGEST / 4, -1e9
"""What hides a key, and what is taken for that: exp(-16376) is 0, and a score may be added without an overflow."""


@dataclass(slots=True)
class Halves:
    """What was done.

    Attributes:
        half: how many nodes compute in float16.
        full: (name, reason) of those that stay in float32.
        casts: how many casts stand between the two, those of inputs and outputs included.
        masks: how many constants that hide keys were brought into float16's range.
    """

    half: int = 0
    full: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    casts: int = 0
    masks: int = 0


def to_halves(
    model: ir.Model, feeds: Sequence[Mapping[str, Array]], *, headroom: float = 2, keep_io: bool = True
) -> Halves:
    """Write a graph in float16, in place.

    Args:
        model: a graph in float32 and standard or ONNX Runtime's operators.
        feeds: inputs to find the range of every value on.
        headroom: how many times larger values may become than they were seen.
        keep_io: leave inputs and outputs in float32, with casts behind and in front of them.
    """
    InlinePass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    report = Halves(masks=_clamp_masks(model))
    full = nodes_in_full(model, feeds, headroom)
    report.half = sum(is_float(node) and node not in full for node in model.graph)
    titles = _titles(model)
    report.full = [(titles[node], reason) for node, reason in full.items() if is_float(node)]
    report.casts = _rewrite(model, full, keep_io=keep_io)
    RemoveUnusedNodesPass()(model)
    model.graph.sort()
    return report


# Constants


def _clamp_masks(model: ir.Model) -> int:
    """Bring what hides a key into the range of float16, in place, and return how many constants that were."""
    count = 0
    for value in list(model.graph.initializers.values()):
        number = constant(value) if value.dtype == FULL else None
        if number is not None and (clamped := _clamped(number)) is not None:
            value.const_value = ir.tensor(clamped, name=value.name)
            count += 1
    for node in model.graph:
        filled = node.attributes.get("value") if node.op_type == "ConstantOfShape" else None
        if filled is not None and (clamped := _clamped(filled.as_tensor().numpy())) is not None:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(clamped))
            count += 1
    return count


def _clamped(number: Array) -> Array | None:
    hidden = (number <= _HIDES) & np.isfinite(number)
    return np.where(hidden, np.float32(_MASK), number).astype(number.dtype) if hidden.any() else None


# Rewriting


class _Casts:
    """Casts of values, one for each value and type, right behind what makes it."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def of(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        if (value, kind) not in self.made:
            self.made[value, kind] = self._constant(value, kind) if value.is_initializer() else self._cast(value, kind)
        return self.made[value, kind]

    def _constant(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        tensor = value.const_value
        assert tensor is not None
        return initializer(self.graph, str(value.name), tensor.numpy().astype(kind.numpy()))

    def _cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        node = ir.node("Cast", [value], attributes={"to": int(kind)})
        node.outputs[0].dtype, node.outputs[0].shape = kind, value.shape
        producer = value.producer()
        if producer is not None:
            self.graph.insert_after(producer, node)
        else:
            self.graph.insert_before(self.graph[0], node)
        return node.outputs[0]


def _rewrite(model: ir.Model, full: Mapping[ir.Node, str], *, keep_io: bool) -> int:
    """Give every node the types that it computes with, and return how many casts that takes."""
    casts, nodes = _Casts(model), list(model.graph)
    wanted: dict[ir.Value, ir.DataType] = {value: FULL for value in model.graph.outputs if value.dtype == FULL}
    if not keep_io:
        wanted = dict.fromkeys(wanted, HALF)
    for value in model.graph.inputs:
        if value.dtype == FULL and not keep_io:
            _retype(value)
    for node in nodes:
        if node not in full:
            _halve(node, model)
    for node in nodes:
        needs: Callable[[int], bool] = _needs_half(node, model) if node not in full else lambda _: False
        for place, value in enumerate(node.inputs):
            kind = HALF if needs(place) else FULL
            if value is not None and value.dtype in (FULL, HALF) and value.dtype != kind:
                node.replace_input_with(place, casts.of(value, kind))
    _inner_graphs(nodes, casts)
    _outputs(model, wanted, casts)
    return sum(key[0].producer() is not None or key[0].is_graph_input() for key in casts.made) + _tail(wanted)


def _halve(node: ir.Node, model: ir.Model) -> None:
    """Let a node make float16 where it makes float32."""
    if node.op_type == "Cast":
        if node.attributes.get_int("to", 0) == FULL:
            node.attributes["to"] = ir.AttrInt64("to", int(HALF))
            _retype(node.outputs[0])
        return
    if node.op_type == "ConstantOfShape":
        filled = node.attributes.get("value")
        number = np.zeros(1, np.float32) if filled is None else filled.as_tensor().numpy()
        if number.dtype == np.float32:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(number.astype(np.float16)))
            _retype(node.outputs[0])
        return
    schema, variables = schema_of(node, model), half_variables(node, model)
    for place, value in enumerate(node.outputs):
        if value.dtype == FULL and schema is not None and formal_type(schema.outputs, place) in variables:
            _retype(value)


def _retype(value: ir.Value) -> None:
    """Say that a value is float16, by a type of its own: copies of a graph share those."""
    value.type = ir.TensorType(HALF)


def _needs_half(node: ir.Node, model: ir.Model) -> Callable[[int], bool]:
    """Return a function that tells of each input whether it must be float16."""
    if node.op_type == "Cast":
        source = node.inputs[0]
        return lambda _: source is not None and source.dtype == HALF  # a cast reads what there is
    schema, variables = schema_of(node, model), half_variables(node, model)
    return lambda place: schema is not None and formal_type(schema.inputs, place) in variables


def _inner_graphs(nodes: Iterable[ir.Node], casts: _Casts) -> None:
    """Give inner graphs what they read from the outer one in float32."""
    for node in nodes:
        for attribute in node.attributes.values():
            inner = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else []
            inner += list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []
            for graph in inner:
                for user in graph.all_nodes():
                    for place, value in enumerate(user.inputs):
                        if value is not None and value.dtype == HALF and value.graph is casts.graph:
                            user.replace_input_with(place, casts.of(value, FULL))


def _outputs(model: ir.Model, wanted: Mapping[ir.Value, ir.DataType], casts: _Casts) -> None:
    """Give the outputs the types they should have, under their names."""
    for value, kind in wanted.items():
        if value.dtype == kind:
            continue
        node = ir.node("Cast", [value], attributes={"to": int(kind)})
        made, name = node.outputs[0], value.name
        made.dtype, made.shape = kind, value.shape
        casts.graph.append(node)
        places = [place for place, output in enumerate(model.graph.outputs) if output is value]
        value.name = f"{name}_{(value.dtype or kind).name.lower()}"
        made.name = name
        for place in places:
            model.graph.outputs[place] = made


def _tail(wanted: Mapping[ir.Value, ir.DataType]) -> int:
    return sum(value.dtype != kind for value, kind in wanted.items())


def _titles(model: ir.Model) -> dict[ir.Node, str]:
    """Return a name for every node: its operator, and how many of those stand before it."""
    counts: Counter[str] = Counter()
    titles: dict[ir.Node, str] = {}
    for node in model.graph:
        titles[node] = f"{node.op_type} {counts[node.op_type]}"
        counts[node.op_type] += 1
    return titles
