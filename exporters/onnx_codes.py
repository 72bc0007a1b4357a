"""Putting our codes into a floating-point ONNX graph, and reading them back.

A product of the graph is recognized by its content: every output column of its weight must be, bit for bit, a row of
one of our quantized layers. So fused, split, permuted or stacked layers of any model family are found alike, nothing
depends on names, and a graph that does not hold our weights cannot pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..core.errors import LlmoptError, UsageError
from ..core.quantized import Grid, QuantizedWeight
from .onnx_nbits import (
    Blocks,
    block_size,
    common_layout,
    pack_codes,
    pack_zero_points,
    to_blocks,
    unpack_codes,
    unpack_zero_points,
)
from .onnx_products import Product, constant, products
from .row_index import Origin, RowIndex

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    import onnx_ir as ir

    from ..core.facts import ModelFacts

    Array = np.ndarray[Any, Any]

Activations = Literal["float32", "int8"]

_ACCURACY_LEVEL = {"float32": 1, "int8": 4}
_DOMAIN = "com.microsoft"


class QuantizedSource(Protocol):
    """The part of `ExportableModel` that is needed here."""

    @property
    def quantized(self) -> Mapping[str, Grid]:
        """The quantized layers by name."""
        ...

    def quantized_weight(self, name: str) -> QuantizedWeight:
        """Read one of them."""
        ...


def check_layout(facts: ModelFacts, grid: Grid | None, *, format_name: str) -> None:
    """Refuse a grid that no block of MatMulNBits can hold.

    Raises:
        UsageError: it names the first layer and the group sizes that work.
    """
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
    carried: dict[tuple[int, int], tuple[list[ir.Value | None], dict[str, int]]] = {}
    for product in found:
        index = indexes.get(product.dtype)
        if index is None:
            continue
        if product.key not in carried:
            matrix = product.matrix()
            origin = index.find(matrix)
            if origin is None:
                continue
            blocks = _gather(source, index, origin, matrix)
            carried[product.key] = _initializers(model.graph, blocks, _name(index, origin))
        _replace(product, *carried[product.key], activations)
    missing = set(source.quantized).intersection(*(index.missing() for index in indexes.values()))
    if missing or (source.quantized and not indexes):
        raise _not_found(sorted(missing or source.quantized), model)
    RemoveUnusedNodesPass()(model)
    if carried:
        model.opset_imports.setdefault(_DOMAIN, 1)
    return _notes(source, activations)


def read_codes(model: ir.Model) -> Iterator[tuple[str, Blocks]]:
    """Yield the name and the codes of every MatMulNBits of a graph."""
    for node in model.graph.all_nodes():
        if node.op_type != "MatMulNBits":
            continue
        bits, block = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
        width, height = node.attributes["K"].as_int(), node.attributes["N"].as_int()
        parts = [constant(value) if value is not None else None for value in node.inputs[1:4]]
        packed, scales, zeros = (None if part is None else part.numpy() for part in [*parts, None][:3])
        if packed is None or scales is None:
            continue
        shape = (height, -(-width // block))
        yield (
            node.name or "",
            Blocks(
                unpack_codes(packed.reshape(height, shape[1], -1), bits, width),
                scales.reshape(shape),
                unpack_zero_points(zeros, bits, shape),
                bits,
                block,
            ),
        )


def codes_equal(model: ir.Model, source: QuantizedSource) -> bool:
    """Return whether a graph holds exactly our codes, scales and zero points: all of them, and no others.

    Scales of a float16 graph are compared with ours rounded to float16.
    """
    index: RowIndex | None = None
    scale_dtype = ""
    for _, blocks in read_codes(model):
        if index is None:
            scale_dtype = str(blocks.scale.dtype)
            index = RowIndex()
            for name in source.quantized:
                index.add(name, _dequantized(source.quantized_weight(name), scale_dtype))
        origin = index.find(blocks.dequantize())
        if origin is None or not _same_rows(source, index, origin, blocks):
            return False
    return index is not None and not index.missing()


def _same_rows(source: QuantizedSource, index: RowIndex, origin: Origin, blocks: Blocks) -> bool:
    for layer, selected in _by_layer(origin):
        ours = _as_dtype(
            to_blocks(source.quantized_weight(index.names[layer]), blocks.bits, blocks.block), blocks.scale.dtype
        )
        rows = origin.rows[selected]
        different = (ours.codes[rows] != blocks.codes[selected]).any(axis=1)
        different |= (ours.scale[rows] != blocks.scale[selected]).any(axis=1)
        different |= (ours.zero_point[rows] != blocks.zero_point[selected]).any(axis=1)
        for row in selected.nonzero()[0][different]:
            if not _has_twin(source, index, blocks, int(row)):
                return False
    return True


def _has_twin(source: QuantizedSource, index: RowIndex, blocks: Blocks, row: int) -> bool:
    """Return whether some other layer holds this row: rows of zeros are alike under any scale."""
    values = Blocks(
        blocks.codes[row : row + 1],
        blocks.scale[row : row + 1],
        blocks.zero_point[row : row + 1],
        blocks.bits,
        blocks.block,
    )
    for layer, at in index.alike(values.dequantize()[0]):
        ours = _as_dtype(
            to_blocks(source.quantized_weight(index.names[layer]), blocks.bits, blocks.block), blocks.scale.dtype
        )
        if (
            (ours.codes[at] == values.codes[0]).all()
            and (ours.scale[at] == values.scale[0]).all()
            and (ours.zero_point[at] == values.zero_point[0]).all()
        ):
            return True
    return False


def _dequantized(weight: QuantizedWeight, scale_dtype: str) -> Array:
    """Return codes times scales in float32, from scales rounded as the graph stores them."""
    import torch

    if scale_dtype == "float16":
        weight = QuantizedWeight(weight.codes, weight.scale.half(), weight.zero_point, weight.grid)
    return weight.dequantize(torch.float32).numpy()


def _index(source: QuantizedSource, dtype: str) -> RowIndex:
    """Index all quantized layers as a graph of `dtype` holds them: rounded to their own dtype, then to that."""
    index = RowIndex()
    for name in source.quantized:
        index.add(name, _stored(source.quantized_weight(name), "float16" if dtype == "FLOAT16" else "float32"))
    return index


def _stored(weight: QuantizedWeight, dtype: str) -> Array:
    import torch

    return weight.dequantize().to(getattr(torch, dtype)).numpy()


def _by_layer(origin: Origin) -> Iterator[tuple[int, Array]]:
    """Yield each layer of an origin with the mask of the rows that come from it."""
    import numpy as np

    for layer in np.unique(origin.layers):
        yield int(layer), origin.layers == layer


def _gather(source: QuantizedSource, index: RowIndex, origin: Origin, matrix: Array) -> Blocks:
    """Collect the codes of all rows of a product, and prove that they stand for its weight.

    Raises:
        LlmoptError: two different rows have the same hash.
    """
    import numpy as np

    names = {layer: index.names[layer] for layer, _ in _by_layer(origin)}
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
    for layer, selected in _by_layer(origin):
        weight, rows = source.quantized_weight(names[layer]), origin.rows[selected]
        if _stored(weight, str(matrix.dtype))[rows].tobytes() != matrix[selected].tobytes():
            raise LlmoptError("two different rows have the same hash", where=names[layer])
        ours = to_blocks(weight, bits, block)
        gathered.codes[selected] = ours.codes[rows]
        gathered.scale[selected] = ours.scale[rows]
        gathered.zero_point[selected] = ours.zero_point[rows]
    return _as_dtype(gathered, matrix.dtype)


def _as_dtype(blocks: Blocks, dtype: Any) -> Blocks:
    """Round the scales to the graph's dtype.

    Raises:
        LlmoptError: a scale becomes infinite or zero.
    """
    import numpy as np

    if blocks.scale.dtype == dtype:
        return blocks
    with np.errstate(over="ignore", under="ignore"):
        scale = blocks.scale.astype(dtype)
    if not np.isfinite(scale).all() or ((scale == 0) & (blocks.scale != 0)).any():
        raise LlmoptError(f"a scale does not fit {np.dtype(dtype).name}", hint="export for float32")
    return Blocks(blocks.codes, scale, blocks.zero_point, blocks.bits, blocks.block)


def _name(index: RowIndex, origin: Origin) -> str:
    """Name a product after its layers: `model.layers.0.mlp.gate_proj+up_proj`."""
    names = [index.names[layer] for layer, _ in _by_layer(origin)]
    return "+".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])


def _initializers(graph: ir.Graph, blocks: Blocks, name: str) -> tuple[list[ir.Value | None], dict[str, int]]:
    """Store packed codes, scales and zero points; return them as inputs, with the sizes as attributes."""
    import onnx_ir as ir

    unique, count = name, 1
    while f"{unique}.codes" in graph.initializers:
        count += 1
        unique = f"{name}#{count}"

    def store(part: str, array: Array | None) -> ir.Value | None:
        if array is None:
            return None
        value = ir.Value(name=f"{unique}.{part}", const_value=ir.tensor(array, name=f"{unique}.{part}"))
        value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        graph.register_initializer(value)
        return value

    out_features, in_features = blocks.codes.shape
    inputs = [
        store("codes", pack_codes(blocks)),
        store("scales", blocks.scale),
        store("zero_points", pack_zero_points(blocks)),
    ]
    return inputs, {"K": in_features, "N": out_features, "bits": blocks.bits, "block_size": blocks.block}


def _replace(product: Product, weights: list[ir.Value | None], sizes: dict[str, int], activations: Activations) -> None:
    import onnx_ir as ir

    old = product.node
    inputs = [old.inputs[0], *weights, *([None, product.bias] if product.bias is not None else [])]
    while inputs[-1] is None:
        inputs.pop()
    new = ir.node(
        "MatMulNBits",
        inputs,
        domain=_DOMAIN,
        attributes={**sizes, "accuracy_level": _ACCURACY_LEVEL[activations]},
        name=f"{old.name or old.outputs[0].name}_codes",
    )
    result, replaced = new.outputs[0], old.outputs[0]
    result.type, result.shape, result.name = replaced.type, replaced.shape, replaced.name
    assert old.graph is not None
    old.graph.insert_before(old, new)
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
