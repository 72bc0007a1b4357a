"""The one representation of a quantized weight. Every format is a packing of these codes.

    weight = (codes - zero_point) * scale        integers
    weight = number(codes) * scale               floating point: the number whose bits the code is

computed in float32 and rounded once to the dtype of `scale`. `codes` are unsigned and unpacked. A symmetric integer
weight stores no zero point: it is 2^(bits - 1) everywhere, so that the codes 0 … 2^bits - 1 stand for the integers
-2^(bits-1) … 2^(bits-1) - 1. Where scales are themselves small numbers, a divisor that all share gives them range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import nan
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    from torch import Tensor


BITS = (2, 3, 4, 5, 6, 8)

BLOCK = 128
"""Rows and columns of a block that shares a scale, where `group_size` is "block"."""

GroupSize = int | Literal["channel", "tensor", "block"]
"""How many weights share a scale: a number of them along the input dimension, a row, the tensor, or 128 x 128."""

Number = Literal["int", "fp8", "nvfp4", "mxfp4"]
"""What a code stands for, and what kind of number a scale is.

    int     integers; scales of the model's dtype
    fp8     e4m3 (no infinities, largest 448); scales of the model's dtype
    nvfp4   e2m1 (largest 6); scales in e4m3 for 16 weights each, and one float32 divisor for all
    mxfp4   e2m1; scales are powers of two (e8m0) for 32 weights each (OCP Microscaling Formats 1.0)
"""

FLOATS: Mapping[Number, tuple[int, GroupSize | None]] = MappingProxyType(
    {"fp8": (8, None), "nvfp4": (4, 16), "mxfp4": (4, 32)}
)
"""Of each floating-point kind the bits, and the group size where it is fixed."""


def _minifloats(exponent_bits: int, mantissa_bits: int, bias: int) -> tuple[float, ...]:
    """Return the value of every code of a small floating-point format, sign bit first; no infinities."""
    half = [
        (mantissa / (1 << mantissa_bits) + (exponent > 0)) * 2.0 ** (max(exponent, 1) - bias)
        for exponent in range(1 << exponent_bits)
        for mantissa in range(1 << mantissa_bits)
    ]
    return (*half, *(-value for value in half))


E2M1 = _minifloats(2, 1, bias=1)
E4M3 = tuple(nan if code & 0x7F == 0x7F else value for code, value in enumerate(_minifloats(4, 3, bias=7)))


class Grid(msgspec.Struct, frozen=True, kw_only=True):
    """The points that weights are put on, as data: kind of number, bits, how many share a scale, symmetric or not."""

    bits: int
    group_size: GroupSize
    symmetric: bool
    number: Number = "int"

    @property
    def levels(self) -> int:
        """Number of code values, 2^bits."""
        return 1 << self.bits

    @property
    def values(self) -> tuple[float, ...] | None:
        """The number that each code stands for; None for integers."""
        return None if self.number == "int" else E4M3 if self.number == "fp8" else E2M1

    @property
    def midpoint(self) -> int:
        """The zero point of a symmetric grid, 2^(bits - 1)."""
        return 1 << (self.bits - 1)

    def group_width(self, in_features: int) -> int:
        """Return how many weights of a row of `in_features` share one scale."""
        if self.group_size == "block":
            return BLOCK
        return self.group_size if isinstance(self.group_size, int) else in_features

    def group_height(self, out_features: int) -> int:
        """Return how many of `out_features` rows share one scale."""
        return {"tensor": out_features, "block": BLOCK}.get(str(self.group_size), 1)

    def divides(self, in_features: int, out_features: int | None = None) -> bool:
        """Return whether groups tile a row of `in_features` weights exactly, and `out_features` rows where given."""
        tall = out_features is None or out_features % self.group_height(out_features) == 0
        return tall and in_features % self.group_width(in_features) == 0

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Return the shape of the scales of a weight, (rows of groups, groups in a row)."""
        return out_features // self.group_height(out_features), in_features // self.group_width(in_features)

    def bits_per_weight(self, out_features: int, in_features: int, scale_bits: int = 16) -> float:
        """Return the storage cost of one weight: its code, and its share of scale and zero point."""
        rows, groups = self.scale_shape(out_features, in_features)
        scale_bits = 8 if self.number in ("nvfp4", "mxfp4") else scale_bits
        side = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + side * rows * groups / (out_features * in_features)

    def __str__(self) -> str:
        """Render as people write it: `int4 group 128 symmetric`, `fp8 channel`, `nvfp4`."""
        group = self.group_size if isinstance(self.group_size, str) else f"group {self.group_size}"
        if self.number == "int":
            return f"int{self.bits} {group} {'symmetric' if self.symmetric else 'asymmetric'}"
        return f"{self.number} {group}" if self.number == "fp8" else self.number


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A linear layer's weight as integer codes with scales.

    Attributes:
        codes: (out_features, in_features), uint8, each below 2^bits.
        scale: (out_features, groups), (1, 1) per tensor, (out_features / 128, in_features / 128) per block; float32,
            float16 or bfloat16. Its dtype is the weight's, also where its values are those of a smaller format.
        zero_point: like `scale`, uint8; None when symmetric.
        grid: kind of number, bits, group size and symmetry.
        divisor: (1,) float32, what all scales are divided by; nvfp4 only.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: Grid
    divisor: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse parts that do not fit together.

        Raises:
            ValueError: the shapes, dtypes or the grid contradict one another.
        """
        if self.grid.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, not {self.grid.bits}")
        if self.codes.ndim != 2 or str(self.codes.dtype) != "torch.uint8":
            raise ValueError(f"codes must be a uint8 matrix, not {tuple(self.codes.shape)} {self.codes.dtype}")
        out_features, in_features = self.shape
        if not self.grid.divides(in_features, out_features):
            raise ValueError(f"a weight of {out_features} x {in_features} is not a multiple of the group size")
        expected = self.grid.scale_shape(out_features, in_features)
        if tuple(self.scale.shape) != expected:
            raise ValueError(f"scale must be {expected}, not {tuple(self.scale.shape)}")
        if self.grid.symmetric != (self.zero_point is None):
            raise ValueError("a symmetric weight has no zero point, an asymmetric one needs it")
        if self.zero_point is not None and self.zero_point.shape != self.scale.shape:
            raise ValueError(f"zero point must be shaped like scale, not {tuple(self.zero_point.shape)}")
        if (self.grid.number == "nvfp4") != (self.divisor is not None):
            raise ValueError("an nvfp4 weight has a divisor of its scales, any other none")
        if self.grid.number != "int" and not self.grid.symmetric:
            raise ValueError("a floating-point grid is symmetric")

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.grid.bits

    def dequantize(self, dtype: Any = None) -> Tensor:
        """Return the weight, (out_features, in_features): the single definition of what it is.

        Args:
            dtype: the dtype to round to; that of `scale` when None. float32 gives the unrounded product.
        """
        out_features, in_features = self.shape
        scale = self.scale.float()
        if self.divisor is not None:
            scale = scale / self.divisor
        rows, groups = scale.shape
        grouped = (rows, out_features // rows, groups, in_features // groups)
        values = self.grid.values
        if values is None:
            zero = self.grid.midpoint if self.zero_point is None else self.zero_point.float()[:, None, :, None]
            numbers = self.codes.reshape(grouped).float().sub_(zero)
        else:
            numbers = scale.new_tensor(values)[self.codes.int()].reshape(grouped)
        weight = numbers.mul_(scale[:, None, :, None])
        return weight.reshape(out_features, in_features).to(dtype or self.scale.dtype)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Return the weight of outputs `start:stop`, whole blocks of them; views, nothing is copied."""
        height = self.grid.group_height(self.shape[0])
        part = slice(None) if self.grid.group_size == "tensor" else slice(start // height, stop // height)
        zero_point = None if self.zero_point is None else self.zero_point[part]
        return replace(self, codes=self.codes[start:stop], scale=self.scale[part], zero_point=zero_point)

    @property
    def nbytes(self) -> int:
        """Bytes at rest when codes and zero points are packed without gaps."""
        scales = self.scale.numel() if self.grid.number in ("nvfp4", "mxfp4") else self.scale.nbytes
        packed = (self.codes.numel() * self.bits + 7) // 8 + scales
        return packed + (0 if self.zero_point is None else (self.zero_point.numel() * self.bits + 7) // 8)
