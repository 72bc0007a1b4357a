"""The containers that ONNX Runtime computes with: codes of 2, 4 or 8 bits in blocks.

`com.microsoft.MatMulNBits` multiplies by them:

    B            uint8 (out, blocks, block * bits / 8)      codes of a block, low bits first
    scales       float (out, blocks)
    zero_points  uint8 (out, ceil(blocks * bits / 8))       low bits first; absent: 2^(bits - 1)

A block is 16, 32, 64, 128 or 256 weights of a row; the last block of a row may be cut short. Codes of 3 bits lie
unchanged in a container of 4, those of 5 and 6 bits in one of 8. Sizes found by running the CPU provider of
ONNX Runtime 1.31, which refuses every other number of bits and block size.

`com.microsoft.GatherBlockQuantized` looks rows up in them, laid out so, (rows, blocks, …), or without gaps:

    data         uint8 (rows, width * bits / 8)             codes of a row, low bits first
    scales       float (rows, blocks)
    zero_points  uint8 (rows, ceil(blocks * bits / 8))
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

from ..core.errors import LlmoptError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np

    from ..core.quantized import Grid, QuantizedWeight

    Array = np.ndarray[Any, Any]

Activations = Literal["float32", "int8"]
"""What a product by codes is computed with."""

ACCURACY_LEVEL = {"float32": 1, "int8": 4}
"""MatMulNBits' number for it."""

CONTAINERS = (2, 4, 8)
BLOCKS = (16, 32, 64, 128, 256)
SHARED_BLOCK = 128
"""Block for a scale that serves more weights than any block holds: the largest that every int8 kernel works on."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows of a weight matrix, unpacked, on blocks of one size.

    Attributes:
        codes: uint8 (out, in).
        scale: floating point (out, blocks).
        zero_point: uint8 (out, blocks).
        bits: bits of the container.
        block: weights in a block.
    """

    codes: Array
    scale: Array
    zero_point: Array
    bits: int
    block: int

    def dequantize(self) -> Array:
        """Return (codes - zero point) * scale in float32, (out, in)."""
        import numpy as np

        width = self.codes.shape[1]
        zero = spread(self.zero_point, self.block, width).astype(np.float32)
        return (self.codes.astype(np.float32) - zero) * spread(self.scale.astype(np.float32), self.block, width)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, and of zero points where they are stored."""
        zeros = self.zero_point.size if (self.zero_point != 1 << (self.bits - 1)).any() else 0
        return (self.codes.size + zeros) * self.bits // 8 + self.scale.nbytes

    def digests(self) -> list[str]:
        """Return a hash of the codes, of the scales, and of the zero points where they are stored."""
        import numpy as np

        missing = self.scale.shape[1] * self.block - self.codes.shape[1]
        arrays = [np.pad(self.codes, ((0, 0), (0, missing))), self.scale]
        if (self.zero_point != 1 << (self.bits - 1)).any():
            arrays.append(self.zero_point)
        return [digest(array) for array in arrays]

    def with_scales_as(self, dtype: Any) -> Blocks:
        """Round the scales to a graph's dtype.

        Raises:
            LlmoptError: a scale becomes infinite or zero.
        """
        import numpy as np

        if self.scale.dtype == dtype:
            return self
        with np.errstate(over="ignore", under="ignore"):
            scale = self.scale.astype(dtype)
        if not np.isfinite(scale).all() or ((scale == 0) & (self.scale != 0)).any():
            raise LlmoptError(f"a scale does not fit {np.dtype(dtype).name}", hint="export in float32")
        return Blocks(self.codes, scale, self.zero_point, self.bits, self.block)


def digest(array: Array) -> str:
    """Return a hash of the numbers of an array, whatever its shape."""
    import numpy as np

    return sha256(array.dtype.name.encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


def container_bits(bits: int) -> int:
    """Return the bits of the smallest container that holds codes of `bits`."""
    return next(size for size in CONTAINERS if size >= bits)


def block_size(grid: Grid, in_features: int) -> int | None:
    """Return the block on which a weight of this grid can be laid out, None if there is none.

    A scale that serves more weights than a block is repeated; one that serves a whole row fits blocks of any size,
    as the last may be cut short.
    """
    width = grid.group_width(in_features)
    if width in BLOCKS:
        return width
    if width >= in_features:
        return next((block for block in BLOCKS if block >= in_features), SHARED_BLOCK)
    return next((block for block in reversed(BLOCKS) if block <= SHARED_BLOCK and width % block == 0), None)


def common_layout(grids: Iterable[tuple[Grid, int]]) -> tuple[int, int] | None:
    """Return (bits, block) of a container for rows of all these (grid, in_features), None if there is none."""
    bits, block = 0, BLOCKS[-1]
    for grid, in_features in grids:
        size = block_size(grid, in_features)
        if size is None:
            return None
        bits, block = max(bits, container_bits(grid.bits)), min(block, size)
    return bits, block


def to_blocks(weight: QuantizedWeight, bits: int, block: int) -> Blocks:
    """Lay a weight out on blocks of a container; the codes stay as they are."""
    import numpy as np

    out_features, in_features = weight.shape
    scale = weight.scale.float().numpy()
    zero = np.full(scale.shape, weight.grid.midpoint, np.uint8)
    if weight.zero_point is not None:
        zero = weight.zero_point.numpy()
    count = -(-in_features // block)
    width = weight.grid.group_width(in_features)
    group = np.arange(count) * block // width
    # A single scale of the whole tensor is one row, which serves them all.
    scale, zero = (np.broadcast_to(part[:, group], (out_features, count)) for part in (scale, zero))
    return Blocks(weight.codes.numpy(), scale, zero, bits, block)


def spread(per_block: Array, block: int, width: int) -> Array:
    """Repeat a value of each block for each of its weights: (out, blocks) to (out, width)."""
    import numpy as np

    return np.repeat(per_block, block, axis=1)[:, :width]


def pack_codes(blocks: Blocks) -> Array:
    """Return the codes as MatMulNBits stores them, uint8 (out, blocks, block * bits / 8)."""
    import numpy as np

    out_features, in_features = blocks.codes.shape
    count = blocks.scale.shape[1]
    padded = np.pad(blocks.codes, ((0, 0), (0, count * blocks.block - in_features)))
    return _pack(padded, blocks.bits).reshape(out_features, count, -1)


def pack_rows(blocks: Blocks) -> Array:
    """Return the codes as GatherBlockQuantized looks them up, uint8 (out, in * bits / 8); `in` fills whole bytes."""
    return _pack(blocks.codes, blocks.bits)


def unpack_codes(packed: Array, bits: int, in_features: int) -> Array:
    """Undo `pack_codes`: uint8 (out, in)."""
    return _unpack(packed.reshape(packed.shape[0], -1), bits)[:, :in_features]


def pack_zero_points(blocks: Blocks) -> Array | None:
    """Return the zero points packed, uint8 (out, ceil(blocks * bits / 8)); None if all are the container's default."""
    import numpy as np

    if (blocks.zero_point == 1 << (blocks.bits - 1)).all():
        return None
    per_byte = 8 // blocks.bits
    return _pack(np.pad(blocks.zero_point, ((0, 0), (0, -blocks.zero_point.shape[1] % per_byte))), blocks.bits)


def unpack_zero_points(packed: Array | None, bits: int, shape: tuple[int, int]) -> Array:
    """Undo `pack_zero_points`: uint8 (out, blocks)."""
    import numpy as np

    if packed is None:
        return np.full(shape, 1 << (bits - 1), np.uint8)
    return _unpack(packed.reshape(shape[0], -1), bits)[:, : shape[1]]


def _pack(values: Array, bits: int) -> Array:
    per_byte = 8 // bits
    parts = values.reshape(values.shape[0], -1, per_byte)
    packed = parts[..., 0].copy()
    for index in range(1, per_byte):
        packed |= parts[..., index] << (index * bits)
    return packed


def _unpack(packed: Array, bits: int) -> Array:
    import numpy as np

    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    values = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return values.reshape(packed.shape[0], -1)
