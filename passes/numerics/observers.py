"""Finding one fixed scale for activations from calibration samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...core.activations import ActivationGrid, QuantizedInput

Observer = Literal["minmax", "percentile", "entropy", "mse"]

_BINS = 4096
_SHARES = 100
_SMALLEST_SHARE = 1 / 16
"""Searches try ranges from the full one down to this share of it, where 256 bins are left for 256 levels."""
_NEAR_ZERO = 8
"""Bins on either side of zero, as many as a level of the full range covers, that the entropy does not weigh more."""
_LOW, _HIGH = -128, 127


@dataclass(slots=True)
class Span:
    """The range of a tensor over all samples."""

    low: float = 0.0
    high: float = 0.0
    tokens: int = 0

    def add(self, values: Tensor) -> None:
        """Look at further values, (tokens, features)."""
        low, high = values.aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        self.tokens += len(values)


class Histogram:
    """How often values fall into each of 4096 bins of a known range.

    Args:
        span: the range, as an earlier look at the same samples found it.
    """

    def __init__(self, span: Span) -> None:
        self.span = span
        width = (span.high - span.low) / _BINS
        self.centers = span.low + width * (torch.arange(_BINS) + 0.5)
        self.counts = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Count further values, of any shape."""
        if self.span.high > self.span.low:
            self.counts += torch.histc(values.float(), _BINS, self.span.low, self.span.high)


def of_range(grid: ActivationGrid, low: float, high: float, dtype: torch.dtype) -> QuantizedInput:
    """Return the rounding of values from `low` (at most 0) to `high` (at least 0); its scale is rounded to `dtype`."""
    wide = max(-low, high) / grid.span if grid.symmetric else (high - low) / (_HIGH - _LOW)
    scale = float(torch.tensor(wide).to(dtype)) or 1.0
    zero = 0 if grid.symmetric else max(_LOW, min(_HIGH, round(_LOW - low / scale)))
    return QuantizedInput(grid=grid, scale=scale, zero_point=zero)


def fit_input(
    grid: ActivationGrid, histogram: Histogram, observer: Observer, percentile: float, dtype: torch.dtype
) -> QuantizedInput:
    """Choose the range of activations.

    Args:
        grid: what they are rounded to.
        histogram: where they lie.
        observer: `minmax` takes all of the range; `percentile` cuts off the same share at each end; `mse` shrinks it to
            where the squared error is smallest, `entropy` to where the rounded distribution tells most of the true one
            (Migacz, 8-bit inference with TensorRT, 2017).
        percentile: of `percentile`, 50 to 100.
        dtype: the dtype the scale will be stored in.
    """
    low, high = histogram.span.low, histogram.span.high
    if observer == "minmax" or low == high:
        return of_range(grid, low, high, dtype)
    if observer == "percentile":
        shares = histogram.counts.cumsum(0) / histogram.counts.sum()
        tail = (1 - percentile / 100) / 2
        places = torch.searchsorted(shares, torch.tensor([tail, 1 - tail], dtype=shares.dtype)).clamp_max(_BINS - 1)
        lower, upper = (float(value) for value in histogram.centers[places])
        return of_range(grid, min(lower, 0.0), max(upper, 0.0), dtype)
    measure = _squared_error if observer == "mse" else _lost_information
    tried = [
        of_range(grid, low * share, high * share, dtype)
        for share in torch.linspace(1, _SMALLEST_SHARE, _SHARES).tolist()
    ]
    return min(tried, key=lambda rounding: measure(histogram, rounding))


def _squared_error(histogram: Histogram, rounding: QuantizedInput) -> float:
    difference = rounding.round(histogram.centers) - histogram.centers
    return float((difference.double().square() * histogram.counts).sum())


def _lost_information(histogram: Histogram, rounding: QuantizedInput) -> float:
    """Return the KL divergence of the rounded distribution, spread over the bins of each level, from the true one.

    What lies beyond the range counts to the outermost bins that do not.
    """
    # Values about zero are told apart by no range, and would decide by their number.
    counts, middle = histogram.counts.clone(), int(histogram.centers.abs().argmin())
    near = slice(max(0, middle - _NEAR_ZERO), middle + _NEAR_ZERO + 1)
    edges = counts[[max(0, near.start - 1), min(_BINS - 1, near.stop)]]
    counts[near] = counts[near].clamp_max(float(edges.max()))
    rounded = rounding.round(histogram.centers)
    inside = (rounded - histogram.centers).abs() <= _half_steps(rounded)
    if not bool(inside.any()):
        return float("inf")
    places = inside.nonzero().squeeze(1)
    true = torch.zeros_like(counts)
    true[places] = counts[places]
    true[places[0]] += counts[: places[0]].sum()
    true[places[-1]] += counts[places[-1] + 1 :].sum()
    _, levels = rounded.unique(return_inverse=True)
    filled = (counts > 0) & inside
    mass = torch.zeros(int(levels.max()) + 1, dtype=torch.float64).index_add_(0, levels, counts * inside)
    bins = torch.zeros_like(mass).index_add_(0, levels, filled.double())
    spread = torch.where(filled, (mass / bins.clamp_min(1))[levels], 0)
    share, guess = true / true.sum(), spread / spread.sum().clamp_min(1e-300)
    known = share > 0
    return float((share[known] * (share[known] / guess[known].clamp_min(1e-12)).log()).sum())


def _half_steps(rounded: Tensor) -> Tensor:
    """Return half the distance from each level to the next, for bins in rising order; a little more to be safe."""
    levels, places = rounded.unique(return_inverse=True)
    if len(levels) == 1:
        return torch.full_like(rounded, float("inf"))
    steps = torch.diff(levels)
    wide = torch.maximum(torch.cat([steps[:1], steps]), torch.cat([steps, steps[-1:]]))
    return wide[places] * 0.51
