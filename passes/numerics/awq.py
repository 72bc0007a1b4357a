"""AWQ: scales that make room for the channels with the most active inputs, and ranges clipped for the output's sake.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan and Han (2024), "AWQ: Activation-aware Weight Quantization for
On-Device LLM Compression and Acceleration". The paper measures each candidate by running the block; the error of a
product's own outputs, tr(D H D^T) with D the error of the weight and H the mean of x x^T, needs no forward pass and is
exact for all calibration tokens, so it chooses the few candidates that are worth one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import os
import torch
from torch import Tensor

from ...core.quantized import Grid
from .grid import Scales, codes_of, grouped, round_to, round_to_nearest, scales_of_range

_ROWS = 1024
"""Rows of a weight on which candidates are compared: one exponent is sought, thousands of errors tell it."""
_SMALLEST = 1e-2
"""A factor is no smaller than this share of the largest energy's, and no larger than its inverse."""
_CLIP_STEPS = 20
_SMALLEST_SHARE = 0.5
_CORRELATED = 128
"""Correlations of inputs further apart than this many columns are left out of the clip search."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Factors for the input channels of a product, and what they bring.

    Attributes:
        factors: (groups,) by which the columns of the weights are multiplied.
        ratio: the exponent they were made with.
        error: mean squared error of the product's outputs, as a share of their mean square.
    """

    factors: Tensor
    ratio: float
    error: float


def candidates(energy: Tensor, weights: Sequence[Tensor], channels: Tensor, grid: Grid, steps: int) -> Iterator[tuple[float, Tensor]]:
    """Yield exponents and factors: activity^r, and activity^r / magnitude^(1 - r), for r = 0, 1 / steps, ….

    Args:
        energy: (in_features,) mean square of each input.
        weights: (out_features, in_features) of each layer of the product.
        channels: (in_features,) which factor each input takes.
        grid: the grid, whose groups the weights' magnitudes are relative to.
        steps: number of exponents.
    """
    activity = pooled(energy, channels).sqrt()
    magnitude = pooled(_magnitude(weights, grid), channels)
    if os.environ.get("TWO"):
        for a in range(0,11):
            for bb in (0,.3,.6,1):
                if a==0 and bb: continue
                yield a/10, normalized(activity**(a/10) / magnitude.clamp_min(1e-4) ** (bb*(1-a/10)))
        return
    for index in range(steps):
        ratio = index / steps
        yield ratio, normalized(activity**ratio)
        yield ratio, normalized(activity**ratio / magnitude.clamp_min(1e-4) ** (1 - ratio))


def pooled(values: Tensor, channels: Tensor) -> Tensor:
    """Return the mean of `values`, (in_features,), over the inputs of each group of tied channels."""
    count = torch.bincount(channels).to(values.dtype)
    return torch.zeros_like(count).index_add_(0, channels, values) / count


def normalized(factors: Tensor) -> Tensor:
    """Return factors whose largest and smallest are each other's inverse; channels without a use take 1."""
    live = torch.isfinite(factors) & (factors > 0)
    if not bool(live.any()):
        return torch.ones_like(factors)
    middle = (factors[live].max() * factors[live].min()).sqrt()
    return torch.where(live, factors / middle, torch.ones_like(factors)).clamp(_SMALLEST, 1 / _SMALLEST)


def _magnitude(weights: Sequence[Tensor], grid: Grid) -> Tensor:
    """Return the mean size of each column relative to the largest weight of its group, (in_features,)."""
    sizes = []
    for weight in weights:
        groups = grouped(weight, grid).abs()
        sizes.append((groups / groups.amax(-1, keepdim=True).clamp_min(1e-12)).reshape(weight.shape).mean(0))
    return torch.stack(sizes).mean(0)


def search(
    weights: Sequence[Tensor], hessian: Tensor, channels: Tensor, grid: Grid, dtype: torch.dtype, *, steps: int, clip: bool = False
) -> list[Candidate]:
    """Return candidates for the factors of a product, the one with the smallest error first.

    Args:
        weights: (out_features, in_features) float32 of each of its layers.
        hessian: (in_features, in_features) mean of x x^T.
        channels: (in_features,) which factor each input takes.
        grid: the grid the weights will be put on.
        dtype: the dtype scales will be stored in.
        steps: number of exponents.
    """
    if grid.group_size != "tensor":
        weights = [weight[:: -(-len(weight) // _ROWS)] for weight in weights]
    power = max(sum(float(((weight @ hessian) * weight).sum()) for weight in weights), 1e-30)
    found: list[Candidate] = []
    for ratio, factors in candidates(hessian.diagonal(), weights, channels, grid, steps):
        wide = factors[channels]
        error = 0.0
        for weight in weights:
            if clip:
                scaled = weight * wide
                scales = clip_scales(scaled, hessian / wide / wide[:, None], grid, dtype, steps=int(os.environ.get("CS","10")), smallest=float(os.environ.get("CL",".5")))
                rounded = scales.weight(round_to(scaled, scales)).dequantize(torch.float32)
            else:
                rounded = round_to_nearest(weight * wide, grid, dtype).dequantize(torch.float32)
            difference = rounded.div_(wide).sub_(weight)
            error += float(((difference @ hessian) * difference).sum())
        found.append(Candidate(factors, ratio, error / power))
    return sorted(found, key=lambda one: one.error)


def clip_scales(weight: Tensor, hessian: Tensor, grid: Grid, dtype: torch.dtype,steps=_CLIP_STEPS,smallest=_SMALLEST_SHARE) -> Scales:
    """Return scales whose ranges are shrunk to where the error of the outputs is smallest, each group by itself.

    Args:
        weight: (out_features, in_features) float32.
        hessian: (in_features, in_features) mean of x x^T.
        grid: bits, group size, symmetry.
        dtype: the dtype scales will be stored in.
    """
    groups = grouped(weight, grid)
    low, high = groups.amin(-1), groups.amax(-1)
    blocks = _diagonal_blocks(hessian, grid.group_width(weight.shape[1]) if grid.group_size != "tensor" else len(hessian))
    best = torch.full_like(low, float("inf"))
    share = torch.ones_like(low)
    for step in range(steps + 1):
        tried = 1 - (1 - smallest) * step / steps
        scale, zero = scales_of_range(low * tried, high * tried, grid, dtype)
        wide, offset = scale.float().unsqueeze(-1), zero.unsqueeze(-1)
        difference = codes_of(groups, wide, offset, grid).sub_(offset).mul_(wide).sub_(groups)
        error = _error(difference.reshape(weight.shape), blocks).reshape(*low.shape, -1).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        share = torch.where(better, tried, share)
    return Scales(*scales_of_range(low * share, high * share, grid, dtype), grid)


def _diagonal_blocks(hessian: Tensor, width: int) -> Tensor:
    """Return the blocks on the diagonal, (blocks, size, size): a group each, or equal parts of wide groups."""
    size = next(size for size in range(min(width, _CORRELATED), 0, -1) if width % size == 0)
    count = len(hessian) // size
    return hessian.reshape(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _error(difference: Tensor, blocks: Tensor) -> Tensor:
    """Return the squared output error of each row and block, (out_features, blocks)."""
    parts = difference.reshape(len(difference), len(blocks), -1).transpose(0, 1)
    return (torch.bmm(parts, blocks) * parts).sum(-1).T
