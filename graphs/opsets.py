"""Versions of the standard operators: converting a graph, and proving that every node exists in the new one."""

from __future__ import annotations

import math
import re
from typing import Any

import onnx_ir as ir

from .attention import spell_out
from .folding import quiet, tidy
from .nodes import Builder, nodes_of, replace
from .shapes import without_weights

_SCRIPTED = 18
"""From here on onnxscript converts upwards, node by node; below, and downwards, onnx's own converter does."""
_GELU = 20
_OF_ONNXRUNTIME = frozenset({"SimplifiedLayerNormalization"})
"""What ONNX Runtime's optimizer writes among the standard operators."""


class ConversionError(Exception):
    """A graph cannot be had in that version; the message names the node at fault."""


def opset_of(model: ir.Model) -> int:
    """Return the version of the standard operators that a graph is written in."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))


def convert_opset(model: ir.Model, target: int) -> None:
    """Write the graph in another version of the standard operators, in place.

    Raises:
        ConversionError: an operator, or a way of using it, does not exist there.
    """
    if target < _SCRIPTED:
        spell_out(model)  # our own operators are written in version 18 when they are spelled out
    if target < _GELU:
        _spell_out_gelu(model)
    with quiet():
        if opset_of(model) < min(_SCRIPTED, target) or target < opset_of(model):
            _convert_by_onnx(model, target if target < opset_of(model) else min(_SCRIPTED, target))
        if opset_of(model) < target:
            _convert_by_script(model, target)
        tidy(model)
    model.graph.opset_imports[""] = target
    for node in model.graph.all_nodes():
        if node.domain in ("", "ai.onnx"):
            _check(node, target)


def newest_opset() -> int:
    """Return the newest version that the installed onnx knows."""
    import onnx

    return onnx.defs.onnx_opset_version()


def _convert_by_script(model: ir.Model, target: int) -> None:
    from onnxscript.version_converter import convert_version

    try:
        convert_version(model, target)
    except (RuntimeError, ValueError) as error:
        raise ConversionError(str(error)) from error


def _convert_by_onnx(model: ir.Model, target: int) -> None:
    import onnx

    for node in model.graph.all_nodes():
        if node.attributes.get_int("noop_with_empty_axes", 1) == 0:  # the default, which older versions do not know
            node.attributes.pop("noop_with_empty_axes")
    with without_weights(model) as proto:
        try:
            converted = ir.from_proto(onnx.version_converter.convert_version(proto, target))
        except (RuntimeError, ValueError) as error:
            reason = re.sub(r"^.*Assertion `.*?` failed: ", "", " ".join(str(error).split()))
            raise ConversionError(f"onnx's converter: {reason}") from error
    _take_over(model, converted.graph)


def _take_over(model: ir.Model, converted: ir.Graph) -> None:
    """Give the model a graph that was made without its weights, and put those in."""
    own = len(model.graph.inputs)
    for value in list(converted.inputs)[own:]:
        weight = model.graph.initializers[value.name or ""].const_value
        assert weight is not None
        value.const_value = weight
    weights = list(converted.inputs)[own:]
    while len(converted.inputs) > own:
        converted.inputs.pop()
    for value in weights:
        converted.register_initializer(value)
    opsets = dict(model.opset_imports)
    model.graph = converted
    for domain, version in opsets.items():
        model.opset_imports.setdefault(domain, version)


def _spell_out_gelu(model: ir.Model) -> None:
    """Write Gelu, an operator since version 20, as x / 2 * (1 + erf(x / sqrt 2)), or with tanh."""
    for node in nodes_of(model, "Gelu"):
        builder, value = Builder(node), node.inputs[0]
        assert value is not None
        kind = (value.dtype or ir.DataType.FLOAT).numpy()

        def number(size: float, builder: Builder = builder, kind: Any = kind) -> ir.Value:
            return builder.constant(size, kind)

        if node.attributes.get_string("approximate", "none") == "tanh":
            cube = builder.op("Mul", builder.op("Mul", value, builder.op("Mul", value, value)), number(0.044715))
            inner = builder.op("Mul", builder.op("Add", value, cube), number(math.sqrt(2 / math.pi)))
            curve = builder.op("Tanh", inner)
        else:
            curve = builder.op("Erf", builder.op("Div", value, number(math.sqrt(2))))
        half = builder.op("Mul", value, number(0.5))
        replace(node.outputs[0], builder.op("Mul", half, builder.op("Add", curve, number(1.0))))
        builder.graph.remove(node, safe=True)


def _check(node: ir.Node, version: int) -> None:
    """Refuse a node that the version has no operator for, or not with these attributes, inputs and types."""
    import onnx

    name = f"`{node.name or node.op_type}` ({node.op_type})"
    try:
        schema = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        if node.op_type in _OF_ONNXRUNTIME:
            return
        raise ConversionError(f"{name}: version {version} has no such operator") from None
    for attribute in node.attributes:
        if attribute not in schema.attributes:
            raise ConversionError(f"{name}: it has no `{attribute}` in version {version}")
    if not schema.min_input <= len(node.inputs) <= schema.max_input:
        raise ConversionError(f"{name}: it does not take {len(node.inputs)} inputs in version {version}")
    for place, value in enumerate(node.inputs):
        formal = schema.inputs[min(place, len(schema.inputs) - 1)]
        if value is None or not isinstance(value.type, ir.TensorType) or not formal.types:
            continue
        kind = f"tensor({value.type.dtype.name.lower()})"
        if kind not in formal.types:
            raise ConversionError(f"{name}: it does not take {kind} in version {version}")
