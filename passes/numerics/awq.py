"""AWQ: scales that make room for the input channels that matter most, and ranges clipped for the outputs' sake.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan and Han (2024), "AWQ: Activation-aware Weight Quantization for
On-Device LLM Compression and Acceleration". The paper runs the layer for each candidate, and clips when the scales are
chosen. Here both are chosen together, without a forward pass: with D the error of the weight and H the mean of x x^T,
the error of the outputs is tr(D H D^T), for all calibration tokens. Groups are rounded by themselves, so the blocks of
H on the diagonal tell candidates apart, and the whole of H is used for the few best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.quantized import Grid
from .grid import Scales, codes_of, fit_scales, grouped, round_to, scales_of_range

_ROWS = 128
"""Rows of each layer on which candidates are compared: two exponents are sought, and each row tells them anew."""
_REFINED = 6
"""How many of the best candidates are compared with the whole of H."""
_LARGEST = 100.0
"""Factors lie between this and its inverse."""
_STRENGTHS = (0.0, 0.5, 1.0)
"""Shares of 1 - ratio that the weights' sizes are taken to the power of."""
_SHRINK_STEPS = 20
_SEARCH_STEPS = 8
_SMALLEST_SHARE = 0.5
_CORRELATED = 128
"""Correlations of inputs further apart than this many columns are left out of the clip search."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """Factors for the input channels of a product, and what they bring.

    Attributes:
        factors: (groups,) by which the columns of the weights are multiplied.
        error: mean squared error of the product's outputs, over their mean square.
    """

    factors: Tensor
    error: float


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer whose scales are sought.

    Attributes:
        weight: (out_features, in_features) float32.
        grid: the grid it will be put on.
    """

    weight: Tensor
    grid: Grid


def search(
    layers: Sequence[Layer], hessian: Tensor, channels: Tensor, dtype: torch.dtype, *, steps: int, clip: bool
) -> list[Candidate]:
    """Return the best factors for a product, the smallest error first; factors of 1 are always among them.

    Args:
        layers: of the product.
        hessian: (in_features, in_features) mean of x x^T.
        channels: (in_features,) which factor each input takes.
        dtype: the dtype scales will be stored in.
        steps: number of exponents.
        clip: the ranges of groups will be clipped.
    """
    layers = [_some_rows(layer) for layer in layers]
    blocks = [diagonal_blocks(hessian, layer.grid) for layer in layers]
    power = max(sum(float(((layer.weight @ hessian) * layer.weight).sum()) for layer in layers), 1e-30)
    tried: list[tuple[float, Tensor, list[Tensor]]] = []
    for factors in _candidates(hessian.diagonal(), layers, channels, steps):
        wide = factors[channels]
        errors = [
            _rounding_error(layer, part, wide, dtype, clip=clip) for layer, part in zip(layers, blocks, strict=True)
        ]
        tried.append(
            (
                sum(float(output_errors(one, part).sum()) for one, part in zip(errors, blocks, strict=True)),
                factors,
                errors,
            )
        )
        best = sorted(tried[1:], key=lambda one: one[0])[:_REFINED]
        tried = [tried[0], *best]
    found = [
        Candidate(factors, sum(float(((error @ hessian) * error).sum()) for error in errors) / power)
        for _, factors, errors in tried
    ]
    return sorted(found, key=lambda one: one.error)


def clip_scales(weight: Tensor, blocks: Tensor, grid: Grid, dtype: torch.dtype, steps: int = _SHRINK_STEPS) -> Scales:
    """Return scales whose ranges are shrunk to where the error of the outputs is smallest, each group by itself.

    Args:
        weight: (out_features, in_features) float32.
        blocks: `diagonal_blocks` of the mean of x x^T.
        grid: bits, group size, symmetry.
        dtype: the dtype scales will be stored in.
        steps: how many ranges to try beside the whole one.
    """
    groups = grouped(weight, grid)
    low, high = groups.amin(-1), groups.amax(-1)
    best = torch.full_like(low, float("inf"))
    share = torch.ones_like(low)
    for step in range(steps + 1):
        tried = 1 - (1 - _SMALLEST_SHARE) * step / steps
        scale, zero = scales_of_range(low * tried, high * tried, grid, dtype)
        wide, offset = scale.float().unsqueeze(-1), zero.unsqueeze(-1)
        difference = codes_of(groups, wide, offset, grid).sub_(offset).mul_(wide).sub_(groups)
        error = output_errors(difference.reshape(weight.shape), blocks).reshape(*low.shape, -1).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        share = torch.where(better, tried, share)
    return Scales(*scales_of_range(low * share, high * share, grid, dtype), grid)


def diagonal_blocks(hessian: Tensor, grid: Grid) -> Tensor:
    """Return the blocks on the diagonal, (blocks, size, size): one for each group, equal parts of wide groups."""
    features = len(hessian)
    width = features if grid.group_size == "tensor" else grid.group_width(features)
    size = next(size for size in range(min(width, _CORRELATED), 0, -1) if width % size == 0)
    parts = hessian.reshape(features // size, size, features // size, size)
    return parts.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def output_errors(difference: Tensor, blocks: Tensor) -> Tensor:
    """Return the squared error of each output that each block's columns make, (out_features, blocks).

    Args:
        difference: (out_features, in_features) error of a weight.
        blocks: `diagonal_blocks`.
    """
    parts = difference.reshape(len(difference), len(blocks), -1).transpose(0, 1)
    return (torch.bmm(parts, blocks) * parts).sum(-1).T


def _some_rows(layer: Layer) -> Layer:
    if layer.grid.group_size == "tensor":
        return layer
    return Layer(layer.weight[:: -(-len(layer.weight) // _ROWS)], layer.grid)


def _rounding_error(layer: Layer, blocks: Tensor, wide: Tensor, dtype: torch.dtype, *, clip: bool) -> Tensor:
    """Return what rounding does to a weight whose columns are scaled by `wide`, (out_features, in_features)."""
    scaled = layer.weight * wide
    if clip:
        parts = wide.reshape(len(blocks), -1)
        seen = blocks / parts.unsqueeze(1) / parts.unsqueeze(2)
        scales = clip_scales(scaled, seen, layer.grid, dtype, _SEARCH_STEPS)
    else:
        scales = fit_scales(scaled, layer.grid, dtype)
    return scales.weight(round_to(scaled, scales)).dequantize(torch.float32).div_(wide).sub_(layer.weight)


def _candidates(energy: Tensor, layers: Sequence[Layer], channels: Tensor, steps: int) -> Iterator[Tensor]:
    """Yield factors: 1 at first, then activity^r / size^(b (1 - r)) for ratios r up to 1 and strengths b.

    The paper's are b = 0 and b = 1.

    Args:
        energy: (in_features,) mean square of each input.
        layers: of the product.
        channels: (in_features,) which factor each input takes.
        steps: number of ratios.
    """
    activity = _pooled(energy, channels).sqrt()
    size = _pooled(torch.stack([_sizes(layer) for layer in layers]).mean(0), channels).clamp_min(1e-4)
    yield torch.ones_like(activity)
    for index in range(1, steps + 1):
        ratio = index / steps
        for strength in _STRENGTHS if index < steps else (0.0,):
            yield _normalized(activity**ratio / size ** (strength * (1 - ratio)))


def _sizes(layer: Layer) -> Tensor:
    """Return the mean size of each column's weights relative to the largest of their group, (in_features,)."""
    groups = grouped(layer.weight, layer.grid).abs()
    return (groups / groups.amax(-1, keepdim=True).clamp_min(1e-12)).reshape(layer.weight.shape).mean(0)


def _pooled(values: Tensor, channels: Tensor) -> Tensor:
    """Return the mean of `values`, (in_features,), over the inputs that share a factor."""
    count = torch.bincount(channels).to(values.dtype)
    return torch.zeros_like(count).index_add_(0, channels, values) / count


def _normalized(factors: Tensor) -> Tensor:
    """Return factors whose largest and smallest are each other's inverse; a channel that is always zero takes 1."""
    live = torch.isfinite(factors) & (factors > 0)
    if not bool(live.any()):
        return torch.ones_like(factors)
    middle = (factors[live].max() * factors[live].min()).sqrt()
    return torch.where(live, factors / middle, torch.ones_like(factors)).clamp(1 / _LARGEST, _LARGEST)
