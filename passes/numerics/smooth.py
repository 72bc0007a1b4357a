"""SmoothQuant: scales that share an input's outliers between activations and weights.

Xiao, Lin, Seznec, Wu, Demouth and Han (2023), "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LEVELS = 127
_SMALLEST = 1e-5
"""A factor is no smaller than this share of the middle one, and no larger than its inverse: a norm has to hold it."""


class InputRange:
    """What smoothing has to know of a product's input: the largest of each channel, and some of its rows.

    Args:
        in_features: channels.
        rows: rows to keep of each call of `add`, evenly spread; 0 for none.
    """

    def __init__(self, in_features: int, rows: int = 0) -> None:
        self.largest = torch.zeros(in_features)
        self._kept: list[Tensor] = []
        self._rows = rows

    def add(self, rows: Tensor) -> None:
        """Add inputs, (tokens, in_features) float32."""
        if not rows.shape[0]:
            return
        torch.maximum(self.largest, rows.abs().amax(0), out=self.largest)
        if self._rows:
            self._kept.append(rows[:: -(-len(rows) // self._rows)].clone())

    @property
    def seen(self) -> bool:
        """Whether any input was not zero."""
        return bool((self.largest > 0).any())

    def sample(self) -> Tensor:
        """Return the rows that were kept, (tokens, in_features)."""
        return torch.cat(self._kept)


def smoothing_factors(largest: Tensor, weights: Sequence[Tensor], channels: Tensor, alpha: float) -> Tensor:
    """Return max|x|^alpha / max|w|^(1 - alpha), by which inputs are divided and columns multiplied, (groups,).

    Only ratios of factors matter, so their geometric mean is made 1. A channel whose inputs or weights are all zero
    takes 1.

    Args:
        largest: (in_features,) largest absolute input.
        weights: (out_features, in_features) of each layer of the product.
        channels: (in_features,) which factor each input takes.
        alpha: share of the outliers that goes to the weights.
    """
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    activity, magnitude = _largest_of(largest, channels), _largest_of(columns, channels)
    live = (activity > 0) & (magnitude > 0)
    if not bool(live.any()):
        return torch.ones_like(activity)
    exponents = alpha * activity[live].log() - (1 - alpha) * magnitude[live].log()
    factors = torch.ones_like(activity)
    factors[live] = (exponents - exponents.mean()).exp()
    return factors.clamp_(_SMALLEST, 1 / _SMALLEST)


def _largest_of(values: Tensor, channels: Tensor) -> Tensor:
    groups = torch.zeros(int(channels.max()) + 1)
    return groups.scatter_reduce_(0, channels, values, "amax")


def int8_error(
    inputs: Tensor, weights: Sequence[Tensor], wide: Tensor, *, largest: Tensor | None, bits: int = 8
) -> float:
    """Return the error of a product's outputs when its inputs and weights are rounded after smoothing.

    Weights are rounded with a scale for each row, inputs with one for each token, or with a single one for all.

    Args:
        inputs: (tokens, in_features) a sample of inputs.
        weights: (out_features, in_features) of each layer.
        wide: (in_features,) what the columns of the weights are multiplied by.
        largest: (in_features,) the largest absolute input of each channel, for one static range; None for one range
            for each token.
        bits: bits of the weights.

    Returns:
        Mean squared error over mean square, over all layers.
    """
    smoothed = inputs / wide
    reach = smoothed.abs().amax(-1, keepdim=True) if largest is None else (largest / wide).max()
    rounded = _round(smoothed, reach, _LEVELS)
    error = power = 0.0
    for weight in weights:
        scaled = weight * wide
        expected = inputs @ weight.T
        got = rounded @ _round(scaled, scaled.abs().amax(-1, keepdim=True), 2 ** (bits - 1) - 1).T
        error += float((got - expected).square().sum())
        power += float(expected.square().sum())
    return error / max(power, 1e-30)


def _round(values: Tensor, reach: Tensor, levels: int) -> Tensor:
    scale = (reach / levels).clamp_min(torch.finfo(torch.float32).tiny)
    return (values / scale).round_().clamp_(-levels, levels).mul_(scale)
