"""What of a graph must stay in float32 where the rest is in float16.

A node does where, on the texts that were tried,

1. one of its numbers comes near the largest of float16, or all of them lie below the smallest that float16 has in full;
2. a sum inside it would be too large: of squares in a norm, of the terms of a mean;
3. a constant of it is beyond float16, or becomes zero in it;
4. it counts positions, turns them by an angle, or makes whole numbers: float16 has those up to 2048 only;
5. it makes the scores of a softmax, and those are so large that their rounding would show;
6. its operator has no float16, or it contains a graph of its own.

What ONNX Runtime's kernels sum up in float32 by themselves (products, softmax, LayerNormalization, attention) is judged
by what goes in and comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from .kernels import schema_of
from .nodes import constant, initializer, size
from .running import outputs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Array = np.ndarray[Any, Any]

FULL, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16

LARGEST, SMALLEST = float(np.finfo(np.float16).max), float(np.finfo(np.float16).smallest_normal)
_WHOLE = 2048
"""Up to here float16 has every whole number."""

_EXPONENT = 64
"""Exponents beyond have an error of 0.03 and more in float16, and what is raised to them of as many hundredths."""

_SQUARES = frozenset({"ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "LpNormalization"})
_MEANS = frozenset({"ReduceMean", "GlobalAveragePool", "AveragePool"})
_COUNTS = frozenset({"Cos", "CumSum", "Range", "Sin"})
_PRODUCTS = frozenset({"Conv", "Gemm", "LayerNormalization", "MatMul", "SimplifiedLayerNormalization", "Softmax"})
_MOVES = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice", "Split"}
    | {"Squeeze", "Tile", "Transpose", "Unsqueeze"}
)


def nodes_in_full(model: ir.Model, feeds: Sequence[Mapping[str, Array]], headroom: float) -> dict[ir.Node, str]:
    """Return the nodes that stay in float32, and why.

    Args:
        model: a graph in float32.
        feeds: inputs to find the range of every value on.
        headroom: how many times larger values may become than they were seen.
    """
    found = _needing_more(model, _ranges(model, feeds), headroom)
    _close(model, found)
    return found


@dataclass(frozen=True, slots=True)
class _Range:
    """The largest magnitude of a value."""

    largest: float

    @property
    def vanishes(self) -> bool:
        """Whether all numbers are smaller than what float16 has in full."""
        return 0 < self.largest < SMALLEST


def _ranges(model: ir.Model, feeds: Sequence[Mapping[str, Array]]) -> dict[str, _Range]:
    """Run the graph and return the range of every value in float32, by name.

    Only maxima leave the engine, so that it keeps no more values at a time than it does anyway.
    """
    copy = model.clone()
    count = len(copy.graph.outputs)
    values = [value for node in copy.graph for value in node.outputs if value.dtype == FULL and value.name]
    values += [value for value in copy.graph.inputs if value.dtype == FULL and not value.is_initializer()]
    whole = initializer(copy.graph, "whole", np.array([-1]))
    zero = initializer(copy.graph, "zero", np.zeros(1, np.float32))
    for value in values:
        flat = ir.node("Reshape", [value, whole])
        # Minus infinity hides keys in float16 as well. Behind a zero what has no elements has a maximum too.
        infinite = ir.node("IsInf", flat.outputs, attributes={"detect_positive": 0})
        finite = ir.node("Where", [infinite.outputs[0], zero, flat.outputs[0]])
        padded = ir.node("Concat", [finite.outputs[0], zero], attributes={"axis": 0})
        magnitude = ir.node("Abs", padded.outputs)
        largest = ir.node("ReduceMax", magnitude.outputs, attributes={"keepdims": 0})
        copy.graph.extend([flat, infinite, finite, padded, magnitude, largest])
        made = largest.outputs[0]
        made.name, made.dtype, made.shape = f"largest of {value.name}", FULL, ir.Shape([])
        copy.graph.outputs.append(made)
    seen = dict.fromkeys((str(value.name) for value in values), 0.0)
    for made in outputs(copy, feeds):
        for value, top in zip(values, made[count:], strict=True):
            seen[str(value.name)] = max(seen[str(value.name)], float(top)) if np.isfinite(top) else np.inf
    return {name: _Range(top) for name, top in seen.items()}


def _needing_more(model: ir.Model, ranges: Mapping[str, _Range], headroom: float) -> dict[ir.Node, str]:
    """Return the nodes that stay in float32, and why."""
    found: dict[ir.Node, str] = {}
    for node in model.graph:
        if (reason := _reason(node, model, ranges, headroom)) is not None:
            found[node] = reason
    _exact(list(model.graph), found)
    for node in model.graph:
        if node.op_type in ("Softmax", "LogSoftmax"):
            _exponents(node, ranges, found)
    return found


def _reason(node: ir.Node, model: ir.Model, ranges: Mapping[str, _Range], headroom: float) -> str | None:
    if not is_float(node):
        return None
    if (reason := _unable(node, model)) is not None:
        return reason
    for value in [*node.inputs, *node.outputs]:
        if value is not None and value.dtype == FULL:
            number = constant(value)
            reason = _beyond(node, value, ranges, headroom) if number is None else _lost(number)
            if reason is not None:
                return reason
    if node.op_type in _COUNTS:
        return "it counts positions" if node.op_type in ("Range", "CumSum") else "it turns positions"
    return "whole numbers beyond 2048" if _counts(node, ranges) else None


def _unable(node: ir.Node, model: ir.Model) -> str | None:
    """Return why a node has no float16 whatever its numbers are."""
    if any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
    ):
        return "it contains a graph"
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    if any(value.type is not None and not isinstance(value.type, ir.TensorType) for value in values):
        return "it works on sequences"
    if node.attributes.get_string("reduction", "none") != "none":
        return f"{node.op_type} sums up in float16, or has no kernel for it"
    return None if _takes_half(node, model) else f"{node.op_type} has no float16"


def _beyond(node: ir.Node, value: ir.Value, ranges: Mapping[str, _Range], headroom: float) -> str | None:
    """Return why the numbers of a value that goes in or comes out are not for float16."""
    seen = ranges.get(str(value.name))
    if seen is None:
        return None
    if seen.largest * headroom > LARGEST:
        return f"values up to {seen.largest:.3g}"
    if seen.vanishes:
        return f"no value above {seen.largest:.1g}"
    total = _total(node, value, seen)
    return f"a sum up to {total:.3g}" if total * headroom > LARGEST else None


def _lost(number: Array) -> str | None:
    """Return why a constant cannot be had in float16."""
    finite = np.abs(number[np.isfinite(number)])
    if finite.size and finite.max() > LARGEST:
        return f"a constant of {finite.max():.3g}"
    if finite.size and finite.max() > 0 and np.float16(finite.max()) == 0:
        return f"a constant of {finite.max():.1g}"
    return None


def _total(node: ir.Node, value: ir.Value, seen: _Range) -> float:
    """Return how large a sum may become inside a node that adds up what goes in."""
    if value not in node.inputs:
        return 0.0
    count = size(value, -1) or 1
    if node.op_type in _SQUARES:
        return count * seen.largest**2
    return count * seen.largest if node.op_type in _MEANS else 0.0


def _counts(node: ir.Node, ranges: Mapping[str, _Range]) -> bool:
    """Return whether a cast makes floating-point numbers of whole ones that float16 does not have."""
    source = node.inputs[0] if node.op_type == "Cast" else None
    if source is None or source.dtype is None or source.dtype.is_floating_point() or node.outputs[0].dtype != FULL:
        return False
    seen = ranges.get(str(node.outputs[0].name))
    return seen is not None and seen.largest > _WHOLE


def _exact(nodes: Iterable[ir.Node], found: dict[ir.Node, str]) -> None:
    """Add what makes angles of sines and cosines, and what is made into whole numbers, back to a product."""
    behind = [(node, "it makes an angle of positions") for node in nodes if node.op_type in ("Cos", "Sin")]
    behind += [(node, "it is made into whole numbers") for node in nodes if _makes_whole(node)]
    found |= {node: reason for node, reason in behind if node not in found}
    while behind:
        last, reason = behind.pop()
        for value in last.inputs:
            node = value.producer() if value is not None else None
            if node is None or value is None or value.dtype != FULL or node in found or node.op_type in _PRODUCTS:
                continue
            found[node] = reason
            behind.append((node, reason))


def _makes_whole(node: ir.Node) -> bool:
    source = node.inputs[0] if node.inputs else None
    if source is None or source.dtype != FULL:
        return False
    made = node.outputs[0].dtype
    whole = node.op_type == "Cast" and made is not None and made.is_integer()
    return whole or node.op_type in ("Ceil", "Floor", "Mod", "Round")


def _exponents(softmax: ir.Node, ranges: Mapping[str, _Range], found: dict[ir.Node, str]) -> None:
    """Add a softmax and what makes its scores, where float16's scores would be wrong by a noticeable factor."""
    chain, behind = [softmax], [softmax.inputs[0]]
    top = 0.0
    while behind:
        value = behind.pop()
        node = value.producer() if value is not None else None
        if node is None or value is None:
            continue
        if node.op_type == "MatMul":
            top = max(top, ranges.get(str(value.name), _Range(0)).largest)
        elif node.op_type in ("Add", "Div", "Mul", "Where"):
            behind += [each for each in node.inputs if each is not None and each.dtype == FULL]
        else:
            continue
        chain.append(node)
    if top > _EXPONENT:
        for node in chain:
            found.setdefault(node, f"exponents up to {top:.3g}")


def _close(model: ir.Model, full: dict[ir.Node, str]) -> None:
    """Add nodes that only hand numbers on from float32 to float32."""
    for node in model.graph:
        if node in full or node.op_type not in _MOVES:
            continue
        before = [value.producer() for value in node.inputs if value is not None and value.dtype == FULL]
        after = [user for value in node.outputs for user in value.consumers()]
        if before and after and all(one in full for one in [*before, *after] if one is not None) and None not in before:
            full[node] = "what is before and behind it is in float32"


def _takes_half(node: ir.Node, model: ir.Model) -> bool:
    """Return whether the operator is defined for float16 where this node has float32."""
    if node.op_type in ("Cast", "ConstantOfShape"):
        return True
    if any(name in node.attributes for name in ("dtype", "output_dtype")):
        return False
    if "stash_type" in node.attributes and any(value.uses() for value in node.outputs[1:]):
        return False
    return not is_float(node) or any(half_variables(node, model))


def half_variables(node: ir.Node, model: ir.Model) -> list[str]:
    """Return the operator's type variables that allow float16."""
    schema = schema_of(node, model)
    if schema is None:
        return []
    return [each.type_param_str for each in schema.type_constraints if "tensor(float16)" in each.allowed_type_strs]


def formal_type(declared: Sequence[Any], place: int) -> str:
    """Return the type, or the type variable, of an operator's input or output; the last may be there many times."""
    return declared[min(place, len(declared) - 1)].typeStr


def is_float(node: ir.Node) -> bool:
    """Return whether a node reads or makes numbers in float32 or float16."""
    return any(value is not None and value.dtype in (FULL, HALF) for value in [*node.inputs, *node.outputs])
