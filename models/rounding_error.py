"""How far rounding moved a weight, at next to no cost: on a few of its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..core.quantized import BLOCK, QuantizedWeight

_ROWS, _STRIP = 32, 4


def rounding_error(weight: QuantizedWeight, rows_of: Callable[[Sequence[slice]], Iterable[Tensor]]) -> float:
    """Return |W - W'| / |W| in the Frobenius norm, to four digits.

    Of a weight of more than 32 rows only 32 are looked at, in strips spread evenly from the first to the last (128 in
    one strip where scales are shared by blocks), so that the figure costs a millisecond whatever the weight's height.
    Squares are summed in float64 and rows without rounding, so the number of threads does not show in the digits kept.

    Args:
        weight: W'.
        rows_of: gives rows of W, (rows, in_features) of any floating dtype, for the slices it is asked for.

    Returns:
        0 too for a weight of zeros, which lie on every grid.
    """
    strips = _strips(weight)
    given = torch.cat(list(rows_of(strips))).float()
    lost = _square(_sampled(weight, strips).dequantize().float().sub_(given))
    whole = _square(given)
    return float(f"{math.sqrt(lost / whole):.4g}") if whole else 0.0


def _square(matrix: Tensor) -> float:
    return math.fsum(matrix.double().square_().sum(1).tolist())


def _sampled(weight: QuantizedWeight, strips: Sequence[slice]) -> QuantizedWeight:
    """Return the weight of some rows: whole blocks of them, or single ones where no block shares scales."""
    if len(strips) == 1:
        return weight.rows(strips[0].start, strips[0].stop)
    rows = torch.cat([torch.arange(strip.start, strip.stop) for strip in strips])
    scales = slice(None) if weight.grid.group_size == "tensor" else rows
    zero_point = None if weight.zero_point is None else weight.zero_point[scales]
    return replace(weight, codes=weight.codes[rows], scale=weight.scale[scales], zero_point=zero_point)


def _strips(weight: QuantizedWeight) -> list[slice]:
    out_features = weight.shape[0]
    if weight.grid.group_size == "block":
        return [slice(0, BLOCK)]
    if out_features <= _ROWS:
        return [slice(0, out_features)]
    count = _ROWS // _STRIP
    starts = [(out_features - _STRIP) * index // (count - 1) for index in range(count)]
    return [slice(start, start + _STRIP) for start in starts]
