"""8-bit products in standard operators, in the form that an engine computes with integers.

    QuantizeLinear(x) -> DequantizeLinear -> Gemm(., DequantizeLinear(weight), DequantizeLinear(bias int32))
    QuantizeLinear(x) -> DequantizeLinear -> MatMul(., DequantizeLinear(weight)) -> Add(., bias)

Inputs are unsigned with one fixed range, so that a text's result does not depend on its neighbours in the batch;
weights are signed with a scale for each output. ONNX Runtime turns the first form into QGemm; with a bias in floating
point, or a MatMul, it would multiply in float32. OpenVINO takes both, but joins the rounding with what makes the input
only where no Reshape to rows stands between: in the first form it rounds five times as slowly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..core.errors import LlmoptError
from ..core.patterns import matches
from .nodes import Builder, constant, initializer, replace, size
from .products import Key, Product, products
from .weights import added_bias, weight_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..core.graph import Engine

    Array = np.ndarray[Any, Any]

_LEVELS, _WEIGHT_LEVEL, _MIDDLE = 255, 127, 128
_PASSING = frozenset({"Reshape", "Unsqueeze", "Squeeze", "Transpose", "Gather", "Identity", "Mul", "Cast"})


@dataclass(frozen=True, slots=True)
class Range:
    """Where the values of an input lie; 0 lies in between."""

    low: float
    high: float

    @property
    def scale(self) -> np.float32:
        """Distance of two levels."""
        return np.float32((self.high - self.low) / _LEVELS) or np.float32(1)

    @property
    def zero_point(self) -> np.uint8:
        """The level of 0."""
        return np.uint8(np.clip(round(-self.low / float(self.scale)), 0, _LEVELS))


@dataclass(frozen=True, slots=True)
class Int8Product:
    """A product that may be computed in 8 bits.

    Attributes:
        product: the node and its matrix.
        name: of the weight.
        output: the product, or the product with its bias added.
        bias: (out,) float32, None when there is none.
    """

    product: Product
    name: str
    output: ir.Value
    bias: Array | None

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """What is rounded as the model runs."""
        return (self.input,)

    @property
    def input(self) -> ir.Value:
        """What is multiplied."""
        value = self.product.node.inputs[0]
        assert value is not None
        return value

    def error(self, rows: Mapping[ir.Value, Array], ranges: Mapping[ir.Value, Range]) -> float:
        """Return the squared error of the product in 8 bits over its square, on some (rows, in) of its input."""
        return self._error(rows[self.input], ranges[self.input])

    def _error(self, rows: Array, span: Range) -> float:
        matrix = self.product.matrix()
        codes, scale = quantized_weight(matrix)
        levels = np.clip(np.rint(rows / span.scale) + span.zero_point, 0, _LEVELS)
        rounded = (levels - span.zero_point).astype(np.float32) * span.scale
        exact = rows @ matrix.T
        difference = rounded @ (codes * scale[:, None]).T - exact
        return float(np.square(difference).sum() / max(float(np.square(exact).sum()), 1e-30))


def candidates(model: ir.Model) -> tuple[list[Int8Product], list[tuple[str, str]]]:
    """Return the products of the outermost graph with a float32 matrix, and (name, reason) of those to leave alone."""
    found: list[Int8Product] = []
    left: list[tuple[str, str]] = []
    for product in products(model):
        node = product.node
        if product.dtype != "FLOAT" or node.graph is not model.graph:
            continue
        output, bias = node.outputs[0], None
        if product.bias is not None:
            bias = constant(product.bias)
        elif (added := added_bias(output)) is not None:
            output, bias = added
        name = weight_name(product)
        if product.bias is not None and bias is None:
            left.append((name, "its bias is no constant"))
        elif _becomes_output(output):
            left.append((name, "it makes an output of the model"))
        elif size(node.inputs[0], -1) is None:
            left.append((name, "the width of its input is not known"))
        else:
            found.append(Int8Product(product, name, output, bias))
    return found, left


def selected(model: ir.Model, ignore: Sequence[str]) -> tuple[list[Int8Product], list[tuple[str, str]]]:
    """Return the products to compute in 8 bits, and (name, reason) of those that are left alone.

    Args:
        model: the graph.
        ignore: patterns of names.

    Raises:
        LlmoptError: there is none.
    """
    found, left = candidates(model)
    chosen = [one for one in found if not any(matches(one.name, pattern) for pattern in ignore)]
    left += [(one.name, "ignored") for one in found if one not in chosen]
    if not chosen:
        raise LlmoptError(
            "no product of the graph can be computed in 8 bits",
            where="; ".join(sorted({reason for _, reason in left})) or "none has constant float32 weights",
            hint="leave the pass out",
        )
    return chosen, left


def quantize_products(
    model: ir.Model, chosen: Sequence[Int8Product], ranges: Mapping[ir.Value, Range], engine: Engine
) -> None:
    """Compute products in 8 bits, in place.

    Args:
        model: the graph.
        chosen: the products.
        ranges: where the values of their inputs lie.
        engine: what will compute them.
    """
    inputs: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    matrices: dict[Key, tuple[ir.Value, Array]] = {}
    for one in chosen:
        builder, source = Builder(one.product.node), one.input
        span = ranges[source]
        if source not in inputs:
            rows = _as_rows(builder, source) if engine == "onnxruntime" else (source, source)
            inputs[source] = _rounded(builder, rows[0], span), rows[1]
        if one.product.key not in matrices:
            matrices[one.product.key] = _weight(builder, one)
        rounded, leading = inputs[source]
        weight, scale = matrices[one.product.key]
        if engine == "onnxruntime":
            bias = _bias(builder, one, span.scale * scale)
            result = builder.op("Gemm", rounded, weight, *bias, dtype=ir.DataType.FLOAT)
            if len(source.shape or ()) != 2:
                shape = builder.op("Concat", leading, builder.constant([len(scale)]), axis=0)
                result = builder.op("Reshape", result, shape)
        else:
            result = builder.op("MatMul", rounded, weight, dtype=ir.DataType.FLOAT)
            if one.bias is not None:
                result = builder.op("Add", result, builder.constant(one.bias.reshape(-1), np.float32))
        replace(one.output, result)
    RemoveUnusedNodesPass()(model)
    model.graph.sort()


def quantized_weight(matrix: Array) -> tuple[Array, Array]:
    """Return codes, (out, in) int8, and scales, (out,) float32: the largest weight of a row is 127."""
    scale = np.abs(matrix).max(axis=1).astype(np.float32) / np.float32(_WEIGHT_LEVEL)
    scale = np.where(scale == 0, np.float32(1), scale)
    return np.clip(np.rint(matrix / scale[:, None]), -_WEIGHT_LEVEL, _WEIGHT_LEVEL).astype(np.int8), scale


def _rounded(builder: Builder, source: ir.Value, span: Range) -> ir.Value:
    """Return the input on its levels."""
    scale = builder.constant(span.scale, np.float32)
    zero = builder.constant(span.zero_point, np.uint8)
    codes = builder.op("QuantizeLinear", source, scale, zero, dtype=ir.DataType.UINT8)
    return builder.op("DequantizeLinear", codes, scale, zero, dtype=ir.DataType.FLOAT)


def _as_rows(builder: Builder, source: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return (rows, in) and the sizes of the axes that became rows."""
    rank = len(source.shape or ())
    leading = builder.op("Shape", source, start=0, end=max(rank - 1, 0), dtype=ir.DataType.INT64)
    if rank == 2:
        return source, leading
    return builder.op("Reshape", source, builder.constant([-1, size(source, -1)])), leading


def _weight(builder: Builder, one: Int8Product) -> tuple[ir.Value, Array]:
    codes, scale = quantized_weight(one.product.matrix())
    stored = initializer(builder.graph, f"{one.name}.codes", np.ascontiguousarray(codes.T))
    scales = initializer(builder.graph, f"{one.name}.scales", scale)
    zeros = initializer(builder.graph, f"{one.name}.zero_points", np.zeros(len(scale), np.int8))
    return builder.op("DequantizeLinear", stored, scales, zeros, axis=1, dtype=ir.DataType.FLOAT), scale


def _bias(builder: Builder, one: Int8Product, scale: Array) -> list[ir.Value]:
    """Return the bias as int32 multiples of what one step of the product is worth."""
    if one.bias is None:
        return []
    codes = np.clip(np.rint(one.bias.reshape(-1) / scale.astype(np.float64)), -(2**31), 2**31 - 1).astype(np.int32)
    stored = initializer(builder.graph, f"{one.name}.bias_codes", codes)
    scales = initializer(builder.graph, f"{one.name}.bias_scales", scale.astype(np.float32))
    zeros = initializer(builder.graph, f"{one.name}.bias_zero_points", np.zeros(len(codes), np.int32))
    return [builder.op("DequantizeLinear", stored, scales, zeros, axis=0, dtype=ir.DataType.FLOAT)]


def _becomes_output(value: ir.Value) -> bool:
    """Return whether a value is an output of the graph, but for its shape and padding."""
    if value.is_graph_output():
        return True
    users = [user for user, place in value.uses() if user.op_type in _PASSING and (place == 0 or user.op_type == "Mul")]
    return any(_becomes_output(user.outputs[0]) for user in users)


def quantize_by_token(model: ir.Model, chosen: Sequence[Int8Product]) -> None:
    """Compute products in 8 bits, the range of each token found as the model runs, in place.

    A scale for each token: one for the tensor, as DynamicQuantizeLinear has it, would make a text's result depend on
    the texts beside it.
    """
    inputs: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
    matrices: dict[Key, tuple[ir.Value, ir.Value, int]] = {}
    for one in chosen:
        builder, source = Builder(one.product.node), one.input
        if source not in inputs:
            inputs[source] = _by_token(builder, source)
        if one.product.key not in matrices:
            codes, scale = quantized_weight(one.product.matrix())
            stored = initializer(builder.graph, f"{one.name}.codes", np.ascontiguousarray(codes.T))
            scales = initializer(builder.graph, f"{one.name}.scales", scale)
            matrices[one.product.key] = stored, scales, len(scale)
        (rows, steps, leading), (weight, scales, width) = inputs[source], matrices[one.product.key]
        middle = builder.constant(_MIDDLE, np.uint8)
        sums = builder.op("MatMulInteger", rows, weight, middle, dtype=ir.DataType.INT32)
        result = builder.op("Cast", sums, to=ir.DataType.FLOAT, dtype=ir.DataType.FLOAT)
        result = builder.op("Mul", builder.op("Mul", result, steps), scales)
        if one.bias is not None:
            result = builder.op("Add", result, builder.constant(one.bias.reshape(-1), np.float32))
        if len(source.shape or ()) != 2:
            shape = builder.op("Concat", leading, builder.constant([width]), axis=0)
            result = builder.op("Reshape", result, shape)
        replace(one.output, result)
    RemoveUnusedNodesPass()(model)
    model.graph.sort()


def _by_token(builder: Builder, source: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return the input as rows of codes, the worth of a step in each, and the sizes of the axes that became rows."""
    rows, leading = _as_rows(builder, source)
    peak = builder.op("ReduceMax", builder.op("Abs", rows), builder.constant([-1]), keepdims=1)
    smallest = builder.constant(1e-30, np.float32)
    steps = builder.op("Div", builder.op("Max", peak, smallest), builder.constant(_WEIGHT_LEVEL, np.float32))
    codes = builder.op("Round", builder.op("Div", rows, steps))
    codes = builder.op("Add", codes, builder.constant(_MIDDLE, np.float32))
    return builder.op("Cast", codes, to=ir.DataType.UINT8, dtype=ir.DataType.UINT8), steps, leading
