"""Packing codes into the words of a format, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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
    import numpy as np
    import torch

    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    if 8 % bits == 0:  # whole codes in a byte: shift and add, no bit is unpacked
        per_byte = 8 // bits
        padded = torch.zeros(rows, words * 4 * per_byte, dtype=torch.uint8)
        padded[:, :columns] = codes
        parts = padded.view(rows, -1, per_byte)
        packed = parts[..., 0].clone()
        for index in range(1, per_byte):
            packed |= parts[..., index] << (bits * index)
        return packed.contiguous().view(torch.int32)
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
        mask = (1 << bits) - 1
        parts = [(data >> (bits * index)) & mask for index in range(8 // bits)]
        return torch.stack(parts, -1).reshape(data.shape[0], -1)[:, :columns].contiguous()
    stream = np.unpackbits(data.numpy(), axis=-1, bitorder="little")[:, : columns * bits]
    codes = np.packbits(stream.reshape(data.shape[0], columns, bits), axis=-1, bitorder="little")
    return torch.from_numpy(codes[..., 0].copy())
