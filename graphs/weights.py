"""Weights as codes that the engine multiplies by, or looks up: finding them, and putting the codes in their place.

    products     MatMulNBits
    embeddings   GatherBlockQuantized; or in standard operators Gather of bytes, Cast, and Mul by a scale for each row

A head that is tied to the embeddings reads the same codes as they do (graphs/nbits.py tells how they lie).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .nbits import ACCURACY_LEVEL, BLOCKS, pack_codes, pack_rows, pack_zero_points
from .nodes import CONTRIB, Builder, constant, initializer, nodes_of, replace, size
from .products import Key, Product, products

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .nbits import Activations, Blocks

    Array = np.ndarray[Any, Any]

_KINDS = frozenset({"FLOAT", "FLOAT16"})
_FLOATS = _KINDS | {"BFLOAT16", "DOUBLE"}
_NARROWEST, _SMALLEST = BLOCKS[0], 1 << 12
"""Narrower matrices are no layers, tables of fewer numbers not worth a node."""

_CARRIES = frozenset(
    {"Cast", "Clip", "Compress", "Expand", "Flatten", "Gather", "GatherND", "Identity", "Reshape", "Slice", "Squeeze"}
    | {"Transpose", "Unsqueeze"}
)
"""What hands on the numbers of its first input."""


@dataclass(slots=True)
class Weight:
    """A constant matrix that is multiplied by, or whose rows are looked up.

    Attributes:
        name: of the layer.
        shape: (rows, width).
        dtype: as ONNX names it.
        matrix: reads it, (rows, width).
        products: the nodes that multiply by it.
        lookups: the Gather nodes that take rows of it.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    matrix: Callable[[], Array]
    products: list[Product] = field(default_factory=list[Product])
    lookups: list[ir.Node] = field(default_factory=list[ir.Node])


def find_weights(model: ir.Model) -> tuple[list[Weight], list[tuple[str, str]]]:
    """Return the weights of the outermost graph, and (name, reason) of those that no kernel takes as codes."""
    found: dict[Key, Weight] = {}
    left: list[tuple[str, str]] = []
    for product in products(model):
        if product.dtype not in _FLOATS:
            continue
        name = weight_name(product)
        if (reason := _refused(model, product)) is not None:
            left.append((name, reason))
            continue
        if product.key not in found:
            found[product.key] = Weight(name, _shape(product), product.dtype, product.matrix)
        found[product.key].products.append(product)
    for node in nodes_of(model, "Gather"):
        table = node.inputs[0]
        tensor = table.const_value if table is not None and table.is_initializer() else None
        if table is None or tensor is None or len(tensor.shape) != 2 or str(tensor.dtype) not in _FLOATS:
            continue
        name = _without_suffix(table.name or "embeddings")
        if (reason := _not_looked_up(model, node, tensor)) is not None:
            left.append((name, reason))
            continue
        rows, width = tensor.shape.numpy()
        found.setdefault((id(table), 0, True), Weight(name, (rows, width), str(tensor.dtype), tensor.numpy))
        found[id(table), 0, True].lookups.append(node)
    return list(found.values()), left


def _refused(model: ir.Model, product: Product) -> str | None:
    """Return why a product cannot be computed from codes."""
    rows = product.node.inputs[0]
    if product.node.graph is not model.graph:
        return "it lies in an inner graph"
    if product.dtype not in _KINDS:
        return f"MatMulNBits has no kernel for {product.dtype.lower()}"
    if _shape(product)[1] < _NARROWEST:
        return f"its {_shape(product)[1]} inputs are fewer than the smallest block has"
    if rows is not None and rows.shape is not None and len(rows.shape) < 2:
        return "its input is a single vector"
    return None


def _not_looked_up(model: ir.Model, node: ir.Node, table: ir.TensorProtocol) -> str | None:
    """Return why rows cannot be looked up as codes."""
    if node.graph is not model.graph:
        return "it lies in an inner graph"
    if node.attributes.get_int("axis", 0) != 0:
        return "its columns are looked up, not its rows"
    if str(table.dtype) not in _KINDS:
        return f"GatherBlockQuantized has no kernel for {str(table.dtype).lower()}"
    if prod(table.shape.numpy()) < _SMALLEST:
        return f"a table of {prod(table.shape.numpy())} numbers is not worth it"
    if node.inputs[1] is None or not _is_given(node.inputs[1]):
        return "its rows are chosen by position, not by a token"
    return None


def _is_given(ids: ir.Value) -> bool:
    """Return whether ids are those of an input, in whatever order: a table of cosines is looked up by positions."""
    while not ids.is_graph_input():
        node = ids.producer()
        if node is None or node.domain or node.op_type not in _CARRIES or node.inputs[0] is None:
            return False
        ids = node.inputs[0]
    return "position" not in (ids.name or "")


def _shape(product: Product) -> tuple[int, int]:
    """Return (outputs, inputs) of a product's matrix without reading it."""
    second = product.node.inputs[1]
    assert second is not None
    sizes = [size(second, 0), size(second, 1)]
    if None in sizes:
        return product.matrix().shape
    rows, columns = (int(each or 0) for each in sizes)
    by_rows = product.node.op_type == "Gemm" and product.node.attributes.get_int("transB", 0)
    return (rows, columns) if by_rows else (columns, rows)


def put_codes(
    model: ir.Model, weight: Weight, blocks: Blocks, *, activations: Activations, look_up: bool, standard: bool = False
) -> None:
    """Put codes in the place of a weight, where it is multiplied by and where it is looked up, in place.

    Args:
        model: the graph.
        weight: as it was found in it.
        blocks: its codes, scales of its own dtype.
        activations: what its products compute with.
        look_up: whether rows are looked up as codes too.
        standard: look them up with standard operators; `blocks` has one block for each row, and 8 bits.
    """
    codes = scales = None
    if weight.products:
        codes, scales = _stored(model, weight.name, pack_codes(blocks), blocks)
    zeros = pack_zero_points(blocks)
    zero_points = None
    if weight.products and zeros is not None:
        zero_points = initializer(model.graph, f"{weight.name}.zero_points", zeros)
    for product in weight.products:
        _multiply(product, (codes, scales, zero_points), blocks, activations)
    if look_up and standard:
        _look_up_bytes(model, weight, blocks)
    elif look_up:
        _look_up(model, weight, blocks, codes)


def tidy_weights(model: ir.Model) -> None:
    """Drop weights that nothing reads any more, and put the nodes into order."""
    RemoveUnusedNodesPass()(model)
    model.graph.sort()
    if any(node.domain == CONTRIB for node in model.graph):
        model.opset_imports.setdefault(CONTRIB, 1)


def _stored(model: ir.Model, name: str, packed: Array, blocks: Blocks) -> tuple[ir.Value, ir.Value]:
    return (
        initializer(model.graph, f"{name}.codes", packed),
        initializer(model.graph, f"{name}.scales", blocks.scale),
    )


def _multiply(product: Product, weights: tuple[ir.Value | None, ...], blocks: Blocks, activations: Activations) -> None:
    node, builder = product.node, Builder(product.node)
    rows, width = blocks.codes.shape
    bias = product.bias
    inside = bias is not None and bias.shape is not None and list(bias.shape) == [rows]
    inputs = [node.inputs[0], *weights, *((None, bias) if inside else ())]
    while inputs[-1] is None:
        inputs.pop()
    result = builder.op(
        "MatMulNBits",
        *inputs,
        domain=CONTRIB,
        K=width,
        N=rows,
        dtype=ir.DataType[product.dtype],
        bits=blocks.bits,
        block_size=blocks.block,
        accuracy_level=ACCURACY_LEVEL[activations],
    )
    if bias is not None and not inside:
        result.shape = node.outputs[0].shape
        result = builder.op("Add", result, bias)
    replace(node.outputs[0], result)
    builder.graph.remove(node, safe=True)


def _look_up(model: ir.Model, weight: Weight, blocks: Blocks, codes: ir.Value | None) -> None:
    """Look rows up in the codes that a product multiplies by, if they lie without gaps, or in codes of their own."""
    width = blocks.codes.shape[1]
    shared = codes is not None and width % blocks.block == 0
    scale, zeros = blocks.scale, pack_zero_points(blocks)
    if shared:
        data, scale = codes, scale[..., None]
        zeros = None if zeros is None else blocks.zero_point[..., None]
    else:
        data = initializer(model.graph, f"{weight.name}.rows", pack_rows(blocks))
    scales = initializer(model.graph, f"{weight.name}.row_scales", scale)
    extra = [] if zeros is None else [initializer(model.graph, f"{weight.name}.row_zero_points", zeros)]
    for node in weight.lookups:
        builder, old = Builder(node), node.outputs[0]
        made = builder.op(
            "GatherBlockQuantized",
            *(data, node.inputs[1], scales, *extra),
            domain=CONTRIB,
            dtype=ir.DataType[weight.dtype],
            bits=blocks.bits,
            block_size=blocks.block,
            gather_axis=0,
            quantize_axis=2 if shared else 1,
        )
        if shared:
            ids = node.inputs[1]
            rank = len(ids.shape) if ids is not None and ids.shape is not None else len(old.shape or ()) - 1
            made = builder.op("Reshape", made, builder.constant([0] * rank + [width]))
        replace(old, made)
        builder.graph.remove(node, safe=True)


def _look_up_bytes(model: ir.Model, weight: Weight, blocks: Blocks) -> None:
    """Look rows up in bytes, and multiply each by its scale."""
    signed = (blocks.codes.astype(np.int16) - (1 << (blocks.bits - 1))).astype(np.int8)
    codes, scales = _stored(model, weight.name, signed, blocks)
    dtype = ir.DataType[weight.dtype]
    for node in weight.lookups:
        builder, old, ids = Builder(node), node.outputs[0], node.inputs[1]
        rows = builder.op("Gather", codes, ids, axis=0, shape=old.shape)
        numbers = builder.op("Cast", rows, to=dtype, dtype=dtype, shape=old.shape)
        steps = builder.op("Gather", scales, ids, axis=0)
        replace(old, builder.op("Mul", numbers, steps))
        builder.graph.remove(node, safe=True)


def looked_up_bytes(model: ir.Model) -> Iterator[tuple[Array, Array]]:
    """Yield the codes, (rows, width) int8, and the scales, (rows, 1), of every table that is looked up as bytes."""
    for node in nodes_of(model, "Mul"):
        cast, steps = (value.producer() if value is not None else None for value in node.inputs)
        rows = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
        gathers = [rows.producer() if rows is not None else None, steps]
        if any(gather is None or gather.op_type != "Gather" for gather in gathers):
            continue
        codes, scales = (constant(gather.inputs[0]) for gather in gathers if gather is not None)
        if codes is not None and scales is not None and codes.dtype == np.int8:
            yield codes, scales


def added_bias(output: ir.Value) -> tuple[ir.Value, Array] | None:
    """Return the sum and the constant that is added to a product, where it is a bias."""
    users = list(output.uses())
    if len(users) != 1 or users[0][0].op_type != "Add" or output.is_graph_output():
        return None
    node, place = users[0]
    bias = constant(node.inputs[1 - place])
    if bias is None or bias.size != size(output, -1) or bias.shape[-1:] != (bias.size,):
        return None
    return node.outputs[0], bias


def weight_name(product: Product) -> str:
    """Return the name of the weight, or of its bias where the weight's own is lost in tracing."""
    node = product.node
    added = added_bias(node.outputs[0])
    adder = added[0].producer() if added is not None else None
    values = [node.inputs[1], product.bias, *(adder.inputs if adder is not None else ())]
    turned = node.inputs[1].producer() if node.inputs[1] is not None else None
    if turned is not None and turned.op_type == "Transpose":
        values.insert(1, turned.inputs[0])
    names = [value.name for value in values if value is not None and value.is_initializer() and value.name]
    best = next((name for name in names if "." in name), names[0] if names else node.name or "product")
    return _without_suffix(best)


def _without_suffix(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")
