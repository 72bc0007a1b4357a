"""HQQ: scales and zero points that minimize a norm of the rounding error which forgives outliers; no data needed.

Badri and Shaji (2023), "Half-Quadratic Quantization of Large Machine Learning Models". The error's l_p norm, p < 1, is
minimized by half-quadratic splitting: an auxiliary variable takes up what the norm regards as outliers (its proximal
operator, a generalized soft threshold), and the grid is fitted to the rest by least squares; in turns, with the weight
of the splitting growing.

The paper keeps the scale and moves a zero point of floating point. Here zero points are integers, and a symmetric grid
has none, so the grid's free parameters are fitted instead: the scale to the centred codes, and an asymmetric grid's
zero point from the regression of weights on codes, rounded before the scale is fitted to it. Errors are measured in
steps of the grid, which makes the splitting's weight independent of the size of the weights. Of all iterates the one
with the least squared error is kept: at 2 and 3 bits the norm's own minimum gives outliers up altogether, which models
bear badly. So the result is never farther from the weights, in squares, than the grid that the solver set out from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.quantized import Grid, QuantizedWeight
from .grid import Scales, grouped, levels_of, round_to

_WEIGHTS = 1 << 20
"""Weights worked on at a time."""


@dataclass(frozen=True, slots=True)
class Splitting:
    """How the half-quadratic solver goes about it.

    Attributes:
        norm: p of the l_p norm.
        beta: weight of the splitting at first; errors are in steps of the grid.
        growth: factor by which it grows with every iteration.
        iterations: how often outliers and grid take turns.
    """

    norm: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    iterations: int = 20


def hqq(weight: Tensor, start: Scales, splitting: Splitting) -> QuantizedWeight:
    """Quantize a weight.

    Args:
        weight: (out_features, in_features) float32; not changed.
        start: the grid to set out from.
        splitting: norm and solver.
    """
    groups = grouped(weight, start.grid)
    rows = max(1, _WEIGHTS // groups[0].numel())
    parts = [
        _solve(part, Scales(scale, zero, start.grid), splitting)
        for part, scale, zero in zip(groups.split(rows), start.scale.split(rows), start.zero.split(rows), strict=True)
    ]
    scale, zero = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    scales = Scales(scale, zero, start.grid)
    return scales.weight(round_to(weight, scales))


def shrink(error: Tensor, beta: float, norm: float) -> Tensor:
    """Return the proximal operator of the l_p norm: small errors become 0, large ones stay nearly as they are.

    Args:
        error: any shape; in steps of the grid.
        beta: weight of the quadratic term.
        norm: p, above 0, at most 1.
    """
    size = error.abs()
    threshold = size.clamp_min(torch.finfo(error.dtype).tiny).pow(norm - 1) / beta
    return error.sign() * (size - threshold).clamp_min_(0)


def _solve(groups: Tensor, start: Scales, splitting: Splitting) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of `groups`, (rows, groups, width): of all iterates those with the least squares."""
    scale, zero, grid, norm = start.scale, start.zero, start.grid, splitting.norm
    best_scale, best_zero, least = scale, zero, torch.full_like(zero, float("inf"))
    beta = splitting.beta
    for index in range(splitting.iterations + 1):
        wide = scale.float().unsqueeze(-1)
        centred = levels_of(groups, wide, zero.unsqueeze(-1), grid).sub_(zero.unsqueeze(-1))
        error = groups / wide - centred
        total = error.square().sum(-1) * scale.float().square()
        better = total < least
        least = torch.where(better, total, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        if index == splitting.iterations:
            break
        rest = groups - shrink(error, beta, norm) * wide
        scale, zero = _fit(rest, centred, scale, zero, grid)
        beta *= splitting.growth
    return best_scale, best_zero


def _fit(rest: Tensor, centred: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point that fit `rest` best by least squares, the codes as they are.

    Args:
        rest: the weights without their outliers, (rows, groups, width).
        centred: codes - zero point, same shape; overwritten.
        scale: the scale now, (rows, groups); kept where the codes do not determine another.
        zero: the zero point now, (rows, groups).
        grid: the grid.
    """
    if not grid.symmetric:
        mean, level = centred.mean(-1, keepdim=True), rest.mean(-1, keepdim=True)
        spread = centred - mean
        variance = spread.square().sum(-1)
        slope = ((rest - level) * spread).sum(-1) / variance
        # rest = slope * (centred - shift): the zero point moves by the shift.
        shift = (mean - level / slope.unsqueeze(-1)).squeeze(-1)
        moved = (zero + shift).round_().clamp_(0, grid.levels - 1)
        moved = torch.where((variance > 0) & (slope > 0), moved, zero)
        centred += (zero - moved).unsqueeze(-1)
        zero = moved
    energy = centred.square().sum(-1)
    fitted = ((rest * centred).sum(-1) / energy).to(scale.dtype)
    usable = (energy > 0) & (fitted > 0) & torch.isfinite(fitted)
    return torch.where(usable, fitted, scale), zero
