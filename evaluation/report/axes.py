"""Scales of a plot: where a value lies, and which values are worth a tick."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear scale.

    Attributes:
        low: the value at `start`.
        high: the value at `stop`.
        start: coordinate of the one end.
        stop: coordinate of the other.
        ticks: round values between the two.
    """

    low: float
    high: float
    start: float
    stop: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Return the coordinate of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def axis(values: Iterable[float], start: float, stop: float, *, zero: bool = False, count: int = 4) -> Axis:
    """Return a scale that holds all values, its ends on round ones.

    Args:
        values: finite ones, at least one.
        start: coordinate of the low end.
        stop: coordinate of the high end.
        zero: begin at 0.
        count: about how many ticks.
    """
    known = list(values)
    low, high = (min(0.0, *known) if zero else min(known)), max(known)
    if high - low <= 1e-12 * max(abs(high), abs(low)):
        room = abs(high) / 2 or 1.0
        low, high = (low if zero else low - room), high + room
    step = _round_up((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(float(f"{step * index:.12g}") for index in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], start, stop, ticks)


def _round_up(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))
