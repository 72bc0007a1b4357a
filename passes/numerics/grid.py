"""Putting a weight on a uniform grid: choosing scales and zero points, and rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.quantized import Grid, QuantizedWeight

_IN_CACHE = 1 << 19
"""So many weights at a time stay in the processor's cache from one step to the next: three times as fast."""

_SHRINK_STEPS = 48
_SMALLEST_SHARE = 0.4
"""The clip search tries ranges from the full one down to this share of it."""


@dataclass(frozen=True, slots=True)
class Scales:
    """Scale and zero point of each group.

    Attributes:
        scale: (out_features, groups), or (1, 1) per tensor; of the dtype that will be stored.
        zero: same shape, float32; the midpoint everywhere when the grid is symmetric.
        grid: the grid they belong to.
    """

    scale: Tensor
    zero: Tensor
    grid: Grid

    def columns(self, in_features: int) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of every column, each (out_features or 1, in_features) float32."""
        repeats = in_features // self.scale.shape[1]
        return self.scale.float().repeat_interleave(repeats, 1), self.zero.repeat_interleave(repeats, 1)

    def weight(self, codes: Tensor) -> QuantizedWeight:
        """Join these scales with `codes`, (out_features, in_features), into a quantized weight."""
        zero = None if self.grid.symmetric else self.zero.to(torch.uint8)
        return QuantizedWeight(codes=codes.to(torch.uint8), scale=self.scale, zero_point=zero, grid=self.grid)


def fit_scales(
    weight: Tensor, grid: Grid, dtype: torch.dtype, *, clip: bool = False, importance: Tensor | None = None
) -> Scales:
    """Choose scale and zero point of each group.

    Symmetric: scale = max|w| / ((2^bits - 1) / 2), as compressed-tensors has it. Asymmetric: the range of the group,
    widened to hold zero, over 2^bits - 1 steps. Scales are rounded to `dtype` before anything is rounded with them.

    Args:
        weight: (out_features, in_features) float32.
        grid: bits, group size, symmetry.
        dtype: the dtype scales will be stored in.
        clip: search, for each group, the share of its range that minimizes the squared error.
        importance: (in_features,), weights of the squared error of each column; all equal when None.
    """
    groups = grouped(weight, grid)
    low, high = groups.amin(-1), groups.amax(-1)
    share = torch.ones_like(low)
    if clip:
        share = _best_share(groups, low, high, grid, dtype, importance=_grouped_importance(importance, groups, weight))
    scale, zero = scales_of_range(low * share, high * share, grid, dtype)
    return Scales(scale, zero, grid)


def round_to(weight: Tensor, scales: Scales) -> Tensor:
    """Return the nearest code of every weight, (out_features, in_features) uint8."""
    groups = grouped(weight, scales.grid)
    scale, zero = scales.scale.float().unsqueeze(-1), scales.zero.unsqueeze(-1)
    return codes_of(groups, scale, zero, scales.grid).reshape(weight.shape).to(torch.uint8)


def round_to_nearest(
    weight: Tensor, grid: Grid, dtype: torch.dtype, *, clip: bool = False, importance: Tensor | None = None
) -> QuantizedWeight:
    """Quantize without looking at data (RTN).

    Args:
        weight: (out_features, in_features), of any floating dtype: it is widened a few rows at a time.
        grid: bits, group size, symmetry.
        dtype: the dtype scales will be stored in.
        clip: as in `fit_scales`.
        importance: as in `fit_scales`.
    """
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    fitted: list[Scales] = []
    rows = len(weight) if grid.group_size == "tensor" else max(1, _IN_CACHE // weight.shape[1])
    for part, made in zip(weight.split(rows), codes.split(rows), strict=True):
        wide = part.float()
        fitted.append(fit_scales(wide, grid, dtype, clip=clip, importance=importance))
        made.copy_(round_to(wide, fitted[-1]))
    scales = Scales(torch.cat([one.scale for one in fitted]), torch.cat([one.zero for one in fitted]), grid)
    return scales.weight(codes)


def grouped(weight: Tensor, grid: Grid) -> Tensor:
    """Return a view of a weight by groups, (out_features, groups, width); (1, 1, all) per tensor."""
    out_features, in_features = weight.shape
    if grid.group_size == "tensor":
        return weight.reshape(1, 1, -1)
    return weight.reshape(out_features, -1, grid.group_width(in_features))


def _grouped_importance(importance: Tensor | None, groups: Tensor, weight: Tensor) -> Tensor | None:
    if importance is None:
        return None
    normalized = importance / importance.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return normalized.expand_as(weight).reshape(groups.shape)


def codes_of(groups: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Return the nearest codes of weights in groups, as float32; `scale` and `zero` have a last dimension of 1."""
    return (groups / scale).round_().add_(zero).clamp_(0, grid.levels - 1)


def scales_of_range(low: Tensor, high: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return scale (of `dtype`) and zero point (float32) of groups that reach from `low` to `high`."""
    steps = grid.levels - 1
    if grid.symmetric:
        scale = torch.maximum(low.abs(), high.abs()) / (steps / 2)
    else:
        low, high = low.clamp_max(0), high.clamp_min(0)
        scale = (high - low) / steps
    scale = scale.to(dtype)
    # A group of zeros, or one too small for the dtype, is exact with any scale: the codes sit on the zero point.
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    if grid.symmetric:
        return scale, torch.full_like(low, grid.midpoint)
    return scale, (-low / scale.float()).round_().clamp_(0, steps)


def _best_share(
    groups: Tensor, low: Tensor, high: Tensor, grid: Grid, dtype: torch.dtype, *, importance: Tensor | None
) -> Tensor:
    best = torch.full_like(low, float("inf"))
    share = torch.ones_like(low)
    for step in range(_SHRINK_STEPS + 1):
        tried = 1 - (1 - _SMALLEST_SHARE) * step / _SHRINK_STEPS
        scale, zero = scales_of_range(low * tried, high * tried, grid, dtype)
        wide, offset = scale.float().unsqueeze(-1), zero.unsqueeze(-1)
        error = codes_of(groups, wide, offset, grid).sub_(offset).mul_(wide).sub_(groups).square_()
        if importance is not None:
            error.mul_(importance)
        total = error.sum(-1)
        better = total < best
        best = torch.where(better, total, best)
        share = torch.where(better, tried, share)
    return share
