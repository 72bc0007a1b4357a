"""Putting our codes into a floating-point ONNX graph, and reading them back.

A product of the graph is recognized by its content: every output column of its weight must be, bit for bit, a row of
one of our quantized layers. So fused, split, permuted or stacked layers of any model family are found alike, nothing
depends on names, and a graph that does not hold our weights cannot pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

from ..core.errors import LlmoptError, UsageError
from ..graphs.nbits import (
    ACCURACY_LEVEL,
    Activations,
    Blocks,
    block_size,
    common_layout,
    pack_codes,
    pack_zero_points,
    to_blocks,
)
from ..graphs.products import Key, Product, products
from .row_index import Origin, RowIndex

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import onnx_ir as ir

    from ..core.facts import ModelFacts
    from ..core.quantized import Grid, QuantizedWeight

    Array = np.ndarray[Any, Any]

_DOMAIN = "com.microsoft"


_MOST_PIECES, _LEAST_ROWS = 6, 16


class QuantizedSource(Protocol):
    """The part of `ExportableModel` that is needed here."""

    @property
    def quantized(self) -> Mapping[str, Grid]:
        """The quantized layers by name."""
        ...

    def quantized_weight(self, name: str) -> QuantizedWeight:
        """Read one of them."""
        ...


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some consecutive output columns of a product.

    Attributes:
        operator: MatMulNBits, or MatMul for columns that are not quantized.
        weights: its constant inputs.
        sizes: its attributes.
    """

    operator: str
    weights: list[ir.Value]
    sizes: dict[str, int]

    def node(self, value: ir.Value | None, name: str, activations: Activations) -> ir.Node:
        """Return the node that multiplies `value`."""
        import onnx_ir as ir

        inputs = [value, *self.weights]
        if self.operator == "MatMul":
            return ir.node("MatMul", inputs, name=name)
        attributes = {**self.sizes, "accuracy_level": ACCURACY_LEVEL[activations]}
        return ir.node("MatMulNBits", inputs, domain=_DOMAIN, attributes=attributes, name=name)


def check_layout(facts: ModelFacts, grid: Grid | None, *, format_name: str) -> None:
    """Refuse a grid that no block of MatMulNBits can hold.

    Raises:
        UsageError: it names the first layer and the group sizes that work.
    """
    if grid is not None and grid.number != "int":
        raise UsageError(
            f"`{format_name}` cannot hold {grid} weights",
            where="ONNX Runtime's CPU kernels for packed weights compute with integers",
            hint="use a scheme with integer weights, such as w8a16 or w4a16, or --export safetensors",
        )
    for linear in facts.linears if grid is not None else ():
        assert grid is not None
        if block_size(grid, linear.in_features) is None:
            raise UsageError(
                f"`{format_name}` cannot hold groups of {grid.group_size} weights",
                where=f"{linear.name}: ONNX Runtime works on blocks of 16, 32, 64, 128 or 256 weights",
                hint="use a group_size that is a multiple of 16, or `channel` or `tensor`",
            )


def carry_codes(model: ir.Model, source: QuantizedSource, *, activations: Activations) -> list[str]:
    """Replace every product with one of our quantized layers by a MatMulNBits with the codes of that layer.

    Args:
        model: a graph in float32 or float16 that was made from the dequantized weights; changed in place.
        source: the quantized layers; each is read a few times and none is kept.
        activations: what the product computes with: float32, or int8 (rounded per block of each token).

    Returns:
        Notes for the user.

    Raises:
        LlmoptError: a quantized layer is not in the graph, or a scale does not fit the graph's float16.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    # First, so that a layer counts as found only where it reaches an output.
    RemoveUnusedNodesPass()(model)
    found = list(products(model))
    dtypes = sorted({product.dtype for product in found} & {"FLOAT", "FLOAT16"})
    indexes = {dtype: _index(source, dtype) for dtype in dtypes}
    carried: dict[Key, list[_Piece] | None] = {}
    for product in found:
        index = indexes.get(product.dtype)
        if index is None:
            continue
        if product.key not in carried:
            carried[product.key] = _pieces(model.graph, source, index, product.matrix())
        if (pieces := carried[product.key]) is not None:
            _replace(product, pieces, activations)
    missing = set(source.quantized).intersection(*(index.missing() for index in indexes.values()))
    if missing or (source.quantized and not indexes):
        raise _not_found(sorted(missing or source.quantized), model)
    RemoveUnusedNodesPass()(model)
    if source.quantized:
        model.opset_imports.setdefault(_DOMAIN, 1)
    return _notes(source, activations)


def _index(source: QuantizedSource, dtype: str) -> RowIndex:
    """Index all quantized layers as a graph of `dtype` holds them: rounded to their own dtype, then to that."""
    index = RowIndex()
    for name in source.quantized:
        index.add(name, _stored(source.quantized_weight(name), "float16" if dtype == "FLOAT16" else "float32"))
    return index


def _stored(weight: QuantizedWeight, dtype: str) -> Array:
    import torch

    return weight.dequantize().to(getattr(torch, dtype)).numpy()


def _gather(source: QuantizedSource, index: RowIndex, origin: Origin, matrix: Array) -> Blocks:
    """Collect the codes of all rows of a product, and prove that they stand for its weight.

    Raises:
        LlmoptError: two different rows have the same hash.
    """
    import numpy as np

    names = {layer: index.names[layer] for layer, _ in origin.by_layer()}
    width = matrix.shape[1]
    layout = common_layout((source.quantized[name], width) for name in names.values())
    if layout is None:
        raise LlmoptError(
            "a grid does not fit the blocks of MatMulNBits",
            where=", ".join(f"{name}: {source.quantized[name]}" for name in names.values()),
            hint="use a group_size that is a multiple of 16, or `channel` or `tensor`",
        )
    bits, block = layout
    count = -(-width // block)
    gathered = Blocks(
        np.empty(matrix.shape, np.uint8),
        np.empty((len(matrix), count), np.float32),
        np.empty((len(matrix), count), np.uint8),
        bits,
        block,
    )
    for layer, selected in origin.by_layer():
        weight, rows = source.quantized_weight(names[layer]), origin.rows[selected]
        if _stored(weight, str(matrix.dtype))[rows].tobytes() != matrix[selected].tobytes():
            raise LlmoptError("two different rows have the same hash", where=names[layer])
        ours = to_blocks(weight, bits, block)
        gathered.codes[selected] = ours.codes[rows]
        gathered.scale[selected] = ours.scale[rows]
        gathered.zero_point[selected] = ours.zero_point[rows]
    return gathered.with_scales_as(matrix.dtype)


def _name(index: RowIndex, origin: Origin) -> str:
    """Name a product after its layers: `model.layers.0.mlp.gate_proj+up_proj`."""
    names = [index.names[layer] for layer, _ in origin.by_layer()]
    return "+".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])


def _pieces(graph: ir.Graph, source: QuantizedSource, index: RowIndex, matrix: Array) -> list[_Piece] | None:
    """Store a product's weight as codes, those of its rows that are not quantized in floating point.

    A fused product may hold layers of which some were left alone. It is taken apart only where the parts are large:
    a row of zeros is alike everywhere, and says nothing.

    Returns:
        The parts in order, None if the product is none of ours.
    """
    import numpy as np

    origin = index.find(matrix)
    known = origin.layers >= 0
    bounds = [0, *(np.flatnonzero(np.diff(known)) + 1).tolist(), len(matrix)]
    runs = list(pairwise(bounds))
    if not known.any() or (len(runs) > 1 and (len(runs) > _MOST_PIECES or min(b - a for a, b in runs) < _LEAST_ROWS)):
        return None
    pieces: list[_Piece] = []
    for start, stop in runs:
        part, rows = origin.part(start, stop), matrix[start:stop]
        if not known[start]:
            pieces.append(_Piece("MatMul", [_store(graph, "float.weight", np.ascontiguousarray(rows.T))], {}))
            continue
        blocks = _gather(source, index, part, rows)
        index.mark(part)
        name = _name(index, part)
        inputs = [
            _store(graph, f"{name}.codes", pack_codes(blocks)),
            _store(graph, f"{name}.scales", blocks.scale),
        ]
        if (zero_points := pack_zero_points(blocks)) is not None:
            inputs.append(_store(graph, f"{name}.zero_points", zero_points))
        sizes = {"K": matrix.shape[1], "N": stop - start, "bits": blocks.bits, "block_size": blocks.block}
        pieces.append(_Piece("MatMulNBits", inputs, sizes))
    return pieces


def _store(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    import onnx_ir as ir

    unique, count = name, 1
    while unique in graph.initializers:
        count += 1
        unique = f"{name}.{count}"
    value = ir.Value(name=unique, const_value=ir.tensor(array, name=unique))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    graph.register_initializer(value)
    return value


def _replace(product: Product, pieces: list[_Piece], activations: Activations) -> None:
    """Put the pieces in the place of a product: side by side, and the bias after them or, with one, inside it."""
    import onnx_ir as ir

    old = product.node
    name = old.name or old.outputs[0].name
    nodes = [piece.node(old.inputs[0], f"{name}_{place}", activations) for place, piece in enumerate(pieces)]
    if len(nodes) > 1:
        nodes.append(ir.node("Concat", [node.outputs[0] for node in nodes], attributes={"axis": -1}))
        if product.bias is not None:
            nodes.append(ir.node("Add", [nodes[-1].outputs[0], product.bias]))
    elif product.bias is not None:
        nodes[0].resize_inputs(6)
        nodes[0].replace_input_with(5, product.bias)
    result, replaced = nodes[-1].outputs[0], old.outputs[0]
    result.type, result.shape, result.name = replaced.type, replaced.shape, replaced.name
    assert old.graph is not None
    old.graph.insert_before(old, nodes)
    replaced.replace_all_uses_with(result, replace_graph_outputs=True)
    old.graph.remove(old, safe=True)


def _not_found(missing: list[str], model: ir.Model) -> LlmoptError:
    operators = sorted({node.op_type for node in model.graph.all_nodes() if node.op_type in ("Loop", "Scan", "If")})
    shown = "\n".join([*missing[:5], *([f"… and {len(missing) - 5} more"] if len(missing) > 5 else [])])
    return LlmoptError(
        f"{len(missing)} quantized layer(s) are not in the ONNX graph as a product with a constant matrix",
        where=shown + (f"\nthe graph has {', '.join(operators)}" if operators else ""),
        hint="leave these layers in floating point with `ignore`, or export to another format",
    )


def _notes(source: QuantizedSource, activations: Activations) -> list[str]:
    notes: list[str] = []
    odd = sorted({grid.bits for grid in source.quantized.values()} - {2, 4, 8})
    if odd:
        sizes = ", ".join(f"{bits}-bit codes in {4 if bits < 4 else 8} bits" for bits in odd)
        notes.append(f"ONNX Runtime stores {sizes}: the codes are unchanged, the file is larger than they need")
    if source.quantized and activations == "int8":
        notes.append("activations are rounded to int8 per block inside the quantized products (accuracy_level 4)")
    return notes
