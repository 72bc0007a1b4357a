"""Reading the codes of a saved ONNX graph, and comparing them with ours, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.quantized import QuantizedWeight
from ..graphs.nbits import Blocks, pack_zero_points, to_blocks, unpack_codes, unpack_zero_points
from ..graphs.products import constant
from .row_index import Origin, RowIndex

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import numpy as np
    import onnx_ir as ir

    from .onnx_codes import QuantizedSource

    Array = np.ndarray[Any, Any]


def read_codes(model: ir.Model) -> Iterator[tuple[str, Blocks]]:
    """Yield the name and the codes of every node that multiplies by codes, or looks them up."""
    from ..graphs.weights import looked_up_bytes

    for node in model.graph.all_nodes():
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        bits, block = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
        lookup = node.op_type == "GatherBlockQuantized"
        values = [node.inputs[0], *node.inputs[2:4]] if lookup else node.inputs[1:4]
        parts = [constant(value) if value is not None else None for value in values]
        packed, scales, zeros = (None if part is None else part.numpy() for part in [*parts, None][:3])
        if packed is None or scales is None:
            continue
        packed = packed.reshape(len(packed), -1)
        width = packed.shape[1] * 8 // bits if lookup else node.attributes["K"].as_int()
        shape = (len(packed), -(-width // block))
        if zeros is not None and zeros.ndim == 3:  # a zero point for each block has a byte
            zeros = pack_zero_points(Blocks(packed, scales, zeros.reshape(shape), bits, block))
        yield (
            node.name or "",
            Blocks(
                unpack_codes(packed, bits, width),
                scales.reshape(shape),
                unpack_zero_points(zeros, bits, shape),
                bits,
                block,
            ),
        )
    for codes, scales in looked_up_bytes(model):
        unsigned = (codes.astype("int16") + 128).astype("uint8")
        yield "", Blocks(unsigned, scales, unpack_zero_points(None, 8, scales.shape), 8, codes.shape[1])


def codes_equal(model: ir.Model, source: QuantizedSource, rounded: Collection[str] = ()) -> bool:
    """Return whether a graph holds exactly our codes, scales and zero points: all of them, and no others.

    Scales of a float16 graph are compared with ours rounded to float16.

    Args:
        model: the graph.
        source: the layers that were quantized before it was made; where there are none, others may be in the graph.
        rounded: hashes of the codes and scales of what was quantized in it.
    """
    index: RowIndex | None = None
    scale_dtype, missing = "", set(rounded)
    for _, blocks in read_codes(model):
        found = set(blocks.digests())
        if found <= set(rounded):
            missing -= found
            continue
        if not source.quantized:
            continue
        if index is None:
            scale_dtype = str(blocks.scale.dtype)
            index = RowIndex()
            for name in source.quantized:
                index.add(name, _dequantized(source.quantized_weight(name), scale_dtype))
        origin = index.find(blocks.dequantize())
        if (origin.layers < 0).any() or not _same_rows(source, index, origin, blocks):
            return False
        index.mark(origin)
    if missing:
        return False
    return not source.quantized or (index is not None and not index.missing())


def _same_rows(source: QuantizedSource, index: RowIndex, origin: Origin, blocks: Blocks) -> bool:
    for layer, selected in origin.by_layer():
        ours = to_blocks(source.quantized_weight(index.names[layer]), blocks.bits, blocks.block)
        ours = ours.with_scales_as(blocks.scale.dtype)
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
        ours = to_blocks(source.quantized_weight(index.names[layer]), blocks.bits, blocks.block)
        ours = ours.with_scales_as(blocks.scale.dtype)
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
