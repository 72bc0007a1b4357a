"""AWQ: scales that make room for the input channels that matter most, and ranges clipped for the outputs' sake.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan and Han (2024), "AWQ: Activation-aware Weight Quantization for
On-Device LLM Compression and Acceleration". The paper runs the layer for each candidate. Here no forward pass is
needed: with D the error of the weight and H the mean of x x^T, the error of the outputs is tr(D H D^T), for all
calibration tokens. Groups are rounded by themselves, so the blocks of H on the diagonal tell candidates apart, and the
whole of H is used for the few best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.quantized import Grid
from .grid import Scales, grouped, levels_of, round_to_nearest, scales_of_range

_ROWS = 512
"""Rows of each layer on which candidates are compared: one exponent is sought, and each row tells it anew."""
_REFINED = 6
"""How many of the best candidates are compared with the whole of H."""
_LARGEST = 100.0
"""Factors lie between this and its inverse."""
_SHRINK_STEPS = 20
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
    layers: Sequence[Layer], hessian: Tensor, channels: Tensor, dtype: torch.dtype, *, steps: int
) -> list[Candidate]:
    """Return the best factors for a product, the smallest error first; factors of 1 are always among them.

    Args:
        layers: of the product.
        hessian: (in_features, in_features) mean of x x^T.
        channels: (in_features,) which factor each input takes.
        dtype: the dtype scales will be stored in.
        steps: number of exponents.
    """
    layers = [_some_rows(layer) for layer in layers]
    blocks = [diagonal_blocks(hessian, layer.grid) for layer in layers]
    power = max(sum(float(((layer.weight @ hessian) * layer.weight).sum()) for layer in layers), 1e-30)
    tried: list[tuple[float, Tensor, list[Tensor]]] = []
    for factors in _candidates(hessian.diagonal(), channels, steps):
        errors = [_rounding_error(layer, factors[channels], dtype) for layer in layers]
        total = sum(float(output_errors(one, part).sum()) for one, part in zip(errors, blocks, strict=True))
        tried.append((total, factors, errors))
        tried = [tried[0], *sorted(tried[1:], key=lambda one: one[0])[:_REFINED]]
    found = [
        Candidate(factors, sum(float(((error @ hessian) * error).sum()) for error in errors) / power)
        for _, factors, errors in tried
    ]
    return sorted(found, key=lambda one: one.error)


def clip_scales(weight: Tensor, blocks: Tensor, grid: Grid, dtype: torch.dtype) -> Scales:
    """Return scales whose ranges are shrunk to where the error of the outputs is smallest, each group by itself.

    Args:
        weight: (out_features, in_features) float32.
        blocks: `diagonal_blocks` of the mean of x x^T.
        grid: bits, group size, symmetry.
        dtype: the dtype scales will be stored in.
    """
    groups = grouped(weight, grid)
    low, high = groups.amin(-1), groups.amax(-1)
    best = torch.full_like(low, float("inf"))
    share = torch.ones_like(low)
    for step in range(_SHRINK_STEPS + 1):
        tried = 1 - (1 - _SMALLEST_SHARE) * step / _SHRINK_STEPS
        scale, zero = scales_of_range(low * tried, high * tried, grid, dtype)
        wide, offset = scale.float().unsqueeze(-1), zero.unsqueeze(-1)
        difference = levels_of(groups, wide, offset, grid).sub_(offset).mul_(wide).sub_(groups)
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


def _rounding_error(layer: Layer, wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what rounding does to a weight whose columns are scaled by `wide`, (out_features, in_features)."""
    rounded = round_to_nearest(layer.weight * wide, layer.grid, dtype)
    return rounded.dequantize(torch.float32).div_(wide).sub_(layer.weight)


def _candidates(energy: Tensor, channels: Tensor, steps: int) -> Iterator[Tensor]:
    """Yield factors: each channel's root mean square to the power of 0, 1 / steps, … 1.

    Args:
        energy: (in_features,) mean square of each input.
        channels: (in_features,) which factor each input takes.
        steps: number of exponents beside 0.
    """
    activity = _pooled(energy, channels).sqrt()
    yield torch.ones_like(activity)
    for index in range(1, steps + 1):
        yield _normalized(activity ** (index / steps))


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
