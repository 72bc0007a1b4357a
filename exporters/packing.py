"""Packing codes into the words of a format, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_IN_CACHE = 1 << 19
"""So many codes at a time stay in the processor's cache from one step to the next."""


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last axis into 32-bit words as compressed-tensors' `pack-quantized` does.

    1. A width that divides 32 gives 32 / bits codes a word, the first in the lowest bits.
    2. Any other width is laid out as one dense stream of bits, lowest first, across word boundaries.
    3. The last word of a row is filled with zero bits.

    Args:
        codes: (rows, columns) uint8, each below 2^bits.
        bits: width of a code, 1 to 8.

    Returns:
        (rows, ceil(columns * bits / 32)) int32.
    """
    import torch

    rows, columns = codes.shape
    packed = torch.empty((rows, -(-columns * bits // 32)), dtype=torch.int32)
    step = max(1, _IN_CACHE // max(1, columns))
    for some, place in zip(codes.split(step), packed.split(step), strict=True):
        place.copy_(_packed(some, bits))
    return packed


def _packed(codes: Tensor, bits: int) -> Tensor:
    import numpy as np
    import torch

    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    if 8 % bits == 0:  # whole codes in a byte: two neighbours become one of twice the width
        packed = torch.nn.functional.pad(codes, (0, words * 32 // bits - columns)).contiguous().reshape(-1)
        for width in _widths_below_byte(bits):
            pairs = packed.view(torch.int16)
            packed = (pairs | (pairs >> (8 - width))).to(torch.uint8)
        return packed.view(torch.int32).reshape(rows, words)
    stream = np.unpackbits(codes.contiguous().numpy()[..., None], axis=-1, bitorder="little")[..., :bits]
    stream = np.pad(stream.reshape(rows, -1), ((0, 0), (0, words * 32 - columns * bits)))
    return torch.from_numpy(np.packbits(stream, axis=-1, bitorder="little")).view(torch.int32)


def unpack_int32(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack_int32`.

    Args:
        packed: (rows, words) int32.
        bits: width of a code.
        columns: how many codes a row holds.

    Returns:
        (rows, columns) uint8.
    """
    import numpy as np
    import torch

    data = packed.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        for width in reversed(_widths_below_byte(bits)):
            pairs = data.to(torch.int16)
            data = ((pairs | (pairs << (8 - width))) & (0x101 * ((1 << width) - 1))).view(torch.uint8)
        return data[:, :columns].contiguous()
    stream = np.unpackbits(data.numpy(), axis=-1, bitorder="little")[:, : columns * bits]
    codes = np.packbits(stream.reshape(data.shape[0], columns, bits), axis=-1, bitorder="little")
    return torch.from_numpy(codes[..., 0].copy())


def _widths_below_byte(bits: int) -> list[int]:
    """Return the widths, from `bits` on, each twice the one before, of which a byte holds two or more."""
    return [width for width in (1, 2, 4) if width >= bits]
