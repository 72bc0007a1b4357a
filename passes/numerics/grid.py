"""Putting a weight on a grid: choosing scales and zero points, and rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.quantized import BLOCK, E2M1, Grid, Number, QuantizedWeight

_IN_CACHE = 1 << 19
"""So many weights at a time stay in the processor's cache from one step to the next: three times as fast."""

_SHRINK_STEPS = 48
_SMALLEST_SHARE = 0.4
"""The clip search tries ranges from the full one down to this share of it."""
_LARGEST: dict[Number, float] = {"fp8": 448.0, "nvfp4": 6.0, "mxfp4": 6.0}
_MX_LIMIT = 7.0
_E2M1_BORDERS = (0.25, 0.75 - 2**-24, 1.25, 1.75 - 2**-23, 2.5, 3.5 - 2**-22, 5.0)
"""Above these numbers of e2m1 are rounded up; halfway they go to the one whose last bit is 0."""


@dataclass(frozen=True, slots=True)
class Scales:
    """Scale and zero point of each group.

    Attributes:
        scale: (out_features, groups), (1, 1) per tensor, one for each block; of the dtype that will be stored.
        zero: same shape, float32; the midpoint everywhere when the grid is symmetric, 0 for floating-point grids.
        grid: the grid they belong to.
        divisor: (1,) float32, see `QuantizedWeight`.
    """

    scale: Tensor
    zero: Tensor
    grid: Grid
    divisor: Tensor | None = None

    @property
    def steps(self) -> Tensor:
        """What a number is multiplied by, shaped like `scale`, float32."""
        return self.scale.float() if self.divisor is None else self.scale.float() / self.divisor

    def columns(self, in_features: int) -> tuple[Tensor, Tensor]:
        """Return step and zero point of every column, each (rows of groups, in_features) float32."""
        repeats = in_features // self.scale.shape[1]
        return self.steps.repeat_interleave(repeats, 1), self.zero.repeat_interleave(repeats, 1)

    def weight(self, levels: Tensor) -> QuantizedWeight:
        """Join these scales with `levels`, (out_features, in_features), into a quantized weight."""
        return self.coded(encode(levels, self.grid))

    def coded(self, codes: Tensor) -> QuantizedWeight:
        """Join these scales with `codes`, (out_features, in_features) uint8, into a quantized weight."""
        zero = None if self.grid.symmetric else self.zero.to(torch.uint8)
        return QuantizedWeight(codes=codes, scale=self.scale, zero_point=zero, grid=self.grid, divisor=self.divisor)


def fit_scales(
    weight: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    *,
    clip: bool = False,
    importance: Tensor | None = None,
    largest: float | None = None,
) -> Scales:
    """Choose scale and zero point of each group.

    Symmetric: scale = max|w| / ((2^bits - 1) / 2), as compressed-tensors has it; of floating-point grids max|w| over
    the largest number. Asymmetric: the range of the group, widened to hold zero, over 2^bits - 1 steps. Scales are
    rounded to `dtype` before anything is rounded with them.

    Args:
        weight: (out_features, in_features) float32.
        grid: bits, group size, symmetry.
        dtype: the dtype scales will be stored in.
        clip: search, for each group, the share of its range that minimizes the squared error.
        importance: (in_features,), weights of the squared error of each column; all equal when None.
        largest: the largest magnitude among the weights that share nvfp4's divisor; of this weight when None.
    """
    groups = grouped(weight, grid)
    low, high = groups.amin(-1), groups.amax(-1)
    divisor = _divisor(low, high, largest) if grid.number == "nvfp4" else None
    share = torch.ones_like(low)
    if clip:
        wanted = _grouped_importance(importance, weight, grid)
        share = _best_share(groups, low, high, grid, dtype, divisor=divisor, importance=wanted)
    scale, zero = scales_of_range(low * share, high * share, grid, dtype, divisor)
    return Scales(scale, zero, grid, divisor)


def round_to(weight: Tensor, scales: Scales) -> Tensor:
    """Return the nearest level of every weight, (out_features, in_features) float32."""
    groups = grouped(weight, scales.grid)
    steps, zero = scales.steps.unsqueeze(-1), scales.zero.unsqueeze(-1)
    return _ungrouped(levels_of(groups, steps, zero, scales.grid), weight.shape, scales.grid)


def round_to_nearest(
    weight: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    *,
    clip: bool = False,
    importance: Tensor | None = None,
    largest: float | None = None,
) -> QuantizedWeight:
    """Quantize without looking at data (RTN).

    Args:
        weight: (out_features, in_features), of any floating dtype: it is widened a few rows at a time.
        grid: bits, group size, symmetry.
        dtype: the dtype scales will be stored in.
        clip: as in `fit_scales`.
        importance: as in `fit_scales`.
        largest: as in `fit_scales`.
    """
    if grid.number == "nvfp4" and largest is None:
        largest = float(weight.abs().max())
    shape = weight.shape[0], weight.shape[1]
    parts = weight.split(rows_in_cache(*shape, grid))
    return round_rows(parts, shape, grid, dtype, clip=clip, importance=importance, largest=largest)


def rows_in_cache(out_features: int, in_features: int, grid: Grid) -> int:
    """Return how many rows of a weight to round at a time, a multiple of those that share scales."""
    height = grid.group_height(out_features)
    return max(1, _IN_CACHE // in_features // height) * height


def round_rows(
    parts: Iterable[Tensor],
    shape: tuple[int, int],
    grid: Grid,
    dtype: torch.dtype,
    *,
    clip: bool = False,
    importance: Tensor | None = None,
    largest: float | None = None,
) -> QuantizedWeight:
    """Quantize a weight of `shape` that comes `rows_in_cache` rows at a time; see `round_to_nearest`.

    Nvfp4 needs to be told `largest`, which no part shows.
    """
    codes = torch.empty(shape, dtype=torch.uint8)
    fitted: list[Scales] = []
    for part, made in zip(parts, codes.split(rows_in_cache(*shape, grid)), strict=True):
        wide = part.float()
        fitted.append(fit_scales(wide, grid, dtype, clip=clip, importance=importance, largest=largest))
        made.copy_(encode(round_to(wide, fitted[-1]), grid))
    scale, zero = torch.cat([one.scale for one in fitted]), torch.cat([one.zero for one in fitted])
    return Scales(scale, zero, grid, fitted[0].divisor).coded(codes)


def grouped(weight: Tensor, grid: Grid) -> Tensor:
    """Return a weight by groups, (rows of groups, groups in a row, weights in a group); a view but for blocks."""
    rows, columns = grid.scale_shape(*weight.shape)
    if grid.group_size != "block":
        return weight.reshape(rows, columns, -1)
    return weight.reshape(rows, BLOCK, columns, BLOCK).transpose(1, 2).reshape(rows, columns, -1)


def _ungrouped(groups: Tensor, shape: torch.Size, grid: Grid) -> Tensor:
    if grid.group_size != "block":
        return groups.reshape(shape)
    return groups.unflatten(-1, (BLOCK, BLOCK)).transpose(1, 2).reshape(shape)


def _grouped_importance(importance: Tensor | None, weight: Tensor, grid: Grid) -> Tensor | None:
    if importance is None:
        return None
    normalized = importance / importance.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return grouped(normalized.expand_as(weight), grid)


def levels_of(groups: Tensor, steps: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Return the nearest levels of weights in groups, as float32; `steps` and `zero` have a last dimension of 1.

    A level is an integer code, or the number that a floating-point code stands for: (level - zero) * step is the
    weight.
    """
    scaled = groups / steps
    if grid.number == "int":
        return scaled.round_().add_(zero).clamp_(0, grid.levels - 1)
    return nearest_number(scaled, grid.number)


def nearest_number(values: Tensor, number: Number) -> Tensor:
    """Return the nearest number of a floating-point kind, ties to even, the largest for what is beyond it; float32."""
    if number == "fp8":
        return values.clamp(-_LARGEST["fp8"], _LARGEST["fp8"]).to(torch.float8_e4m3fn).float()
    table = values.new_tensor(E2M1[:8])
    places = torch.bucketize(values.abs(), values.new_tensor(_E2M1_BORDERS), out_int32=True)
    return table[places].copysign_(values)


def encode(levels: Tensor, grid: Grid) -> Tensor:
    """Return the codes of levels, uint8."""
    if grid.number == "int":
        # Signed bytes are converted by vector instructions, unsigned ones one at a time.
        return levels.to(torch.uint8) if grid.bits == 8 else levels.to(torch.int8).view(torch.uint8)
    levels = levels.float() + 0.0  # there is one zero: -0 + 0 = 0
    if grid.number == "fp8":
        return levels.to(torch.float8_e4m3fn).view(torch.uint8)
    places = torch.searchsorted(levels.new_tensor(E2M1[:8]), levels.abs(), out_int32=True)
    return (places + 8 * (levels < 0)).to(torch.uint8)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """Return the levels of codes, float32: the inverse of `encode`."""
    if grid.values is None:
        return codes.float()
    return torch.tensor(grid.values)[codes.int()]


def scales_of_range(
    low: Tensor, high: Tensor, grid: Grid, dtype: torch.dtype, divisor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return scale (of `dtype`) and zero point (float32) of groups that reach from `low` to `high`."""
    if grid.number != "int":
        return _float_scales(torch.maximum(low.abs(), high.abs()), grid.number, dtype, divisor), torch.zeros_like(low)
    steps = grid.levels - 1
    if grid.symmetric:
        scale = torch.maximum(low.abs(), high.abs()) / (steps / 2)
    else:
        low, high = low.clamp_max(0), high.clamp_min(0)
        scale = (high - low) / steps
    scale = _without_zeros(scale.to(dtype))
    if grid.symmetric:
        return scale, torch.full_like(low, grid.midpoint)
    return scale, (-low / scale.float()).round_().clamp_(0, steps)


def _float_scales(top: Tensor, number: Number, dtype: torch.dtype, divisor: Tensor | None) -> Tensor:
    """Return the scales of groups whose largest magnitude is `top`."""
    scale = top / _LARGEST[number]
    if number == "nvfp4":
        assert divisor is not None
        scale = nearest_number(scale * divisor, "fp8")
    elif number == "mxfp4":
        # The power of two that brings the largest weight below 7, which is rounded to 6; 7 and more goes up.
        exponent = torch.frexp(top / _MX_LIMIT)[1].float()
        smallest, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max
        scale = torch.exp2(exponent).clamp_(smallest, 2.0 ** math.floor(math.log2(largest)))
        return torch.where(top == 0, 1.0, scale).to(dtype)
    return _without_zeros(scale.to(dtype))


def _without_zeros(scale: Tensor) -> Tensor:
    """Put 1 for a scale of zero: a group of zeros, or one too small for the dtype, sits on zero with any scale."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _divisor(low: Tensor, high: Tensor, largest: float | None) -> Tensor:
    """Return nvfp4's divisor: with it the scale of the group with the largest weight is the largest e4m3 number."""
    top = float(torch.maximum(low.abs(), high.abs()).max()) if largest is None else largest
    wanted = _LARGEST["fp8"] * _LARGEST["nvfp4"] / top if top else 1.0
    return torch.tensor([min(wanted, torch.finfo(torch.float32).max)], dtype=torch.float32)


def _best_share(
    groups: Tensor,
    low: Tensor,
    high: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    *,
    divisor: Tensor | None,
    importance: Tensor | None,
) -> Tensor:
    best = torch.full_like(low, float("inf"))
    share = torch.ones_like(low)
    for step in range(_SHRINK_STEPS + 1):
        tried = 1 - (1 - _SMALLEST_SHARE) * step / _SHRINK_STEPS
        scale, zero = scales_of_range(low * tried, high * tried, grid, dtype, divisor)
        wide, offset = Scales(scale, zero, grid, divisor).steps.unsqueeze(-1), zero.unsqueeze(-1)
        error = levels_of(groups, wide, offset, grid).sub_(offset).mul_(wide).sub_(groups).square_()
        if importance is not None:
            error.mul_(importance)
        total = error.sum(-1)
        better = total < best
        best = torch.where(better, total, best)
        share = torch.where(better, tried, share)
    return share
