"""The one representation of a quantized weight. Every format is a packing of these codes.

    weight = (codes - zero_point) * scale        computed in float32, rounded once to the dtype of `scale`

`codes` are unsigned and unpacked. A symmetric weight stores no zero point: it is 2^(bits - 1) everywhere, so that
the codes 0 … 2^bits - 1 stand for the integers -2^(bits-1) … 2^(bits-1) - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    from torch import Tensor


BITS = (2, 3, 4, 5, 6, 8)

GroupSize = int | Literal["channel", "tensor"]
"""How many weights along the input dimension share a scale: a number, a whole row, or the whole tensor."""


class Grid(msgspec.Struct, frozen=True, kw_only=True):
    """A uniform integer grid as data: how many bits, how many weights share a scale, symmetric or not."""

    bits: int
    group_size: GroupSize
    symmetric: bool

    @property
    def levels(self) -> int:
        """Number of code values, 2^bits."""
        return 1 << self.bits

    @property
    def midpoint(self) -> int:
        """The zero point of a symmetric grid, 2^(bits - 1)."""
        return 1 << (self.bits - 1)

    def group_width(self, in_features: int) -> int:
        """Return how many weights of a row of `in_features` share one scale."""
        return self.group_size if isinstance(self.group_size, int) else in_features

    def divides(self, in_features: int) -> bool:
        """Return whether groups tile a row of `in_features` weights exactly."""
        return in_features % self.group_width(in_features) == 0

    def bits_per_weight(self, out_features: int, in_features: int, scale_bits: int = 16) -> float:
        """Return the storage cost of one weight: its code, and its share of scale and zero point."""
        scales = 1 if self.group_size == "tensor" else out_features * (in_features // self.group_width(in_features))
        side = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + side * scales / (out_features * in_features)

    def __str__(self) -> str:
        """Render as people write it: `int4 group 128 symmetric`."""
        group = self.group_size if isinstance(self.group_size, str) else f"group {self.group_size}"
        return f"int{self.bits} {group} {'symmetric' if self.symmetric else 'asymmetric'}"


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A linear layer's weight as integer codes with scales.

    Attributes:
        codes: (out_features, in_features), uint8, each below 2^bits.
        scale: (out_features, groups), or (1, 1) per tensor; float32, float16 or bfloat16. Its dtype is the weight's.
        zero_point: like `scale`, uint8; None when symmetric.
        grid: bits, group size and symmetry.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: Grid

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
        if not self.grid.divides(in_features):
            raise ValueError(f"{in_features} input features are not a multiple of the group size")
        groups = in_features // self.grid.group_width(in_features)
        expected = (1, 1) if self.grid.group_size == "tensor" else (out_features, groups)
        if tuple(self.scale.shape) != expected:
            raise ValueError(f"scale must be {expected}, not {tuple(self.scale.shape)}")
        if self.grid.symmetric != (self.zero_point is None):
            raise ValueError("a symmetric weight has no zero point, an asymmetric one needs it")
        if self.zero_point is not None and self.zero_point.shape != self.scale.shape:
            raise ValueError(f"zero point must be shaped like scale, not {tuple(self.zero_point.shape)}")

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
        zero = self.grid.midpoint if self.zero_point is None else self.zero_point.float().unsqueeze(-1)
        groups = 1 if self.grid.group_size == "tensor" else scale.shape[1]
        codes = self.codes.reshape(out_features, groups, in_features // groups).float()
        weight = (codes.sub_(zero)).mul_(scale.unsqueeze(-1))
        return weight.reshape(out_features, in_features).to(dtype or self.scale.dtype)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Return the weight of outputs `start:stop`; views, nothing is copied."""
        whole = self.grid.group_size == "tensor"
        part = slice(None) if whole else slice(start, stop)
        zero_point = None if self.zero_point is None else self.zero_point[part]
        return QuantizedWeight(
            codes=self.codes[start:stop], scale=self.scale[part], zero_point=zero_point, grid=self.grid
        )

    @property
    def nbytes(self) -> int:
        """Bytes at rest when codes and zero points are packed without gaps."""
        packed = (self.codes.numel() * self.bits + 7) // 8 + self.scale.nbytes
        return packed + (0 if self.zero_point is None else (self.zero_point.numel() * self.bits + 7) // 8)
