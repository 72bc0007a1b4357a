"""What a batch costs on this machine, measured with the artifact itself, in a second or two."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from .batching import CostTable, grid_of

SECONDS = 2.0
SHORTEST = 8
_FILL = 0.5
_NOISE = 0.25
_SHORT = 0.05

Timer = Callable[[Sequence[int]], float]
"""Computes a batch of texts of the given lengths, and returns the seconds it took."""


def measure_costs(timer: Timer, *, longest: int, size: int, seconds: float = SECONDS) -> CostTable:
    """Measure batches of several lengths and sizes, the small ones first, until the time is over.

    One of them is computed once more with half of its tokens: a graph that leaves padding out takes less time for it,
    and its batches then cost their tokens.

    Args:
        timer: computes a batch.
        longest: tokens of the longest text.
        size: the most texts in a batch.
        seconds: about how long to measure.
    """
    end = time.perf_counter() + seconds
    lengths, sizes = grid_of(longest, first=SHORTEST), grid_of(size, factor=4)
    timer([lengths[0]])  # the first run of an engine is slower than any other
    found: dict[tuple[int, int], float] = {}
    area, took = 1, 0.0
    for length, count in sorted(((x, y) for x in lengths for y in sizes), key=lambda one: one[0] * one[1]):
        due = took * length * count / area
        if found and time.perf_counter() + due > end:
            break
        took = found[length, count] = timer([length] * count)
        area = length * count
        if took < _SHORT:  # a hiccup of the machine weighs much
            found[length, count] = min(took, timer([length] * count))
    return CostTable(_usable(found), _by_fill(timer, found))


def _usable(found: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    """Leave out lengths whose single text was not measured: the table extrapolates from smaller lengths."""
    singles = {length for length, count in found if count == 1}
    return {place: value for place, value in found.items() if place[0] in singles}


def _by_fill(timer: Timer, found: dict[tuple[int, int], float]) -> float:
    """Return how far batches cost their tokens rather than their padded tokens, from 0 to 1."""
    wide = [(length, count) for length, count in found if count > 1 and length > 1]
    if not wide:
        return 0.0
    length, count = max(wide, key=lambda one: one[0] * one[1])
    ragged = [length, *[max(1, int(length * _FILL))] * (count - 1)]
    full = min(found[length, count], timer([length] * count))
    saved = 1 - min(timer(ragged), timer(ragged)) / full
    share = saved / (1 - sum(ragged) / (length * count))
    return min(1.0, share) if share > _NOISE else 0.0
