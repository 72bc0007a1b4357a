"""How sure a figure is: the bootstrap over samples, paired where two models saw the same ones.

Efron 1979, "Bootstrap methods: another look at the jackknife". With few samples percentiles are too narrow; they are
taken further out as in Hesterberg 2015, "What teachers should know about the bootstrap" (the expanded percentile
interval), which is exact for the mean of normal values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

Columns = Mapping[str, "Array"]
"""What was measured of the samples: arrays of one length, a value for each sample."""

Statistic = Callable[[Columns], float]

FEWEST = 5
"""With fewer samples there is no interval."""

RESAMPLES = 2000
_SEED = 0


def count(columns: Columns) -> int:
    """Return the number of samples."""
    return len(next(iter(columns.values()), ()))


def bootstrap(
    columns: Columns, statistic: Statistic, confidence: float, *, units: float | None = None
) -> tuple[float, float] | None:
    """Return the interval that holds the figure with this confidence, None with fewer than `FEWEST` samples.

    Args:
        columns: what was measured of each sample.
        statistic: makes the figure of such columns.
        confidence: such as 0.95.
        units: for a share of things that were right or wrong: how many there were. Where all samples say the same,
            no resample says anything else, and the bootstrap would take the share for known; the interval is then as
            wide as so many equal answers allow (Clopper and Pearson 1934).
    """
    import numpy as np

    samples = count(columns)
    if samples < FEWEST:
        return None
    choices = np.random.default_rng(_SEED).integers(0, samples, (RESAMPLES, samples))
    made = [statistic({name: values[chosen] for name, values in columns.items()}) for chosen in choices]
    finite = [value for value in made if math.isfinite(value)]
    if len(finite) < RESAMPLES:
        return None
    outside = _tail(confidence, samples)
    low, high = (float(value) for value in np.quantile(finite, [outside, 1 - outside]))
    if units is not None and low == high:
        unseen = 1 - ((1 - confidence) / 2) ** (1 / units)
        return low - unseen, high + unseen
    return low, high


def _tail(confidence: float, samples: int) -> float:
    """Return the share of resamples that is left out on each side."""
    from scipy.special import ndtr, stdtrit

    t = stdtrit(samples - 1, (1 + confidence) / 2)
    return float(ndtr(-math.sqrt(samples / (samples - 1)) * t))


def samples_needed(value: float, low: float, high: float, limit: float, samples: int) -> int | None:
    """Return how many samples would move an interval to one side of `limit`; None where no number can be told.

    Intervals shrink with the square root of the number of samples; the figure is taken to stay where it is.
    """
    distance = abs(value - limit)
    width = value - low if limit < value else high - value
    if distance <= 0 or width <= 0:
        return None
    needed = math.ceil(samples * (width / distance) ** 2 * (1 + 1e-9))
    return max(needed, samples + 1)
