"""Intervals: they hold what they promise, with few samples too, and are the same each time."""

import math

import numpy as np
import pytest
from llmopt.evaluation.intervals import FEWEST, bootstrap, samples_needed

MADE = np.random.default_rng(0)


def mean(columns):
    return float(columns["x"].mean())


@pytest.mark.parametrize("samples", [5, 8, 40])
def test_an_interval_holds_the_mean_as_often_as_it_says(samples):
    held = 0
    for _ in range(150):
        low, high = bootstrap({"x": MADE.normal(3.0, 1.0, samples)}, mean, 0.9)
        held += low <= 3.0 <= high
    assert 0.83 <= held / 150 <= 0.97  # 150 draws of 0.9: three standard errors are 0.073


def test_an_interval_grows_with_its_confidence_and_shrinks_with_the_samples():
    few = {"x": MADE.normal(size=20)}
    many = {"x": MADE.normal(size=2000)}

    def width(columns, confidence):
        low, high = bootstrap(columns, mean, confidence)
        return high - low

    assert width(few, 0.99) > width(few, 0.9)
    assert width(many, 0.9) < width(few, 0.9) / 5


def test_it_is_the_same_each_time():
    columns = {"x": MADE.normal(size=30)}
    assert bootstrap(columns, mean, 0.95) == bootstrap(columns, mean, 0.95)


def test_columns_stay_together():
    """A pair of models that differ by a constant differ by it in every resample, however far the samples spread."""
    own = MADE.normal(size=30) * 100
    low, high = bootstrap({"a": own, "b": own + 1}, lambda both: float((both["b"] - both["a"]).mean()), 0.95)
    assert (low, high) == pytest.approx((1.0, 1.0))


def test_too_few_samples_have_no_interval():
    assert bootstrap({"x": MADE.normal(size=FEWEST - 1)}, mean, 0.95) is None
    assert bootstrap({"x": MADE.normal(size=FEWEST)}, mean, 0.95) is not None


def test_a_share_that_was_never_wrong_is_not_known_exactly():
    low, high = bootstrap({"x": np.ones(10)}, mean, 0.95, units=10)
    assert low == pytest.approx(0.025 ** (1 / 10))  # Clopper and Pearson: 69 %
    assert high > 1
    assert bootstrap({"x": np.ones(10)}, mean, 0.95) == (1.0, 1.0)  # a mean of anything else


def test_a_figure_that_resamples_do_not_have_has_no_interval():
    assert bootstrap({"x": MADE.normal(size=9)}, lambda columns: math.nan, 0.95) is None


def test_samples_needed_shrinks_the_interval_to_the_limit():
    assert samples_needed(1.0, 0.6, 1.4, 1.2, samples=10) == 41  # twice as narrow, and one more for rounding
    assert samples_needed(1.0, 0.6, 1.4, 0.8, samples=10) == 41
    assert samples_needed(1.0, 0.6, 1.4, 1.0, samples=10) is None


def test_as_many_samples_as_were_called_for_decide():
    x = MADE.normal(size=12)
    value = float(x.mean())
    low, high = bootstrap({"x": x}, mean, 0.95)
    limit = value + 0.4 * (high - value)
    needed = samples_needed(value, low, high, limit, 12)
    more = np.tile(x, math.ceil(2 * needed / 12))
    low, high = bootstrap({"x": more}, mean, 0.95)
    assert high < limit or low > limit
