"""Observers: where a fixed scale of activations comes from."""

from __future__ import annotations

import pytest
import torch
from llmopt.core.activations import ActivationGrid
from llmopt.passes.numerics.observers import Histogram, Span, fit_input

INT8 = ActivationGrid(number="int8", scale="tensor")
SHIFTED = ActivationGrid(number="int8", scale="tensor", symmetric=False)


def look(values: torch.Tensor) -> Histogram:
    span = Span()
    span.add(values)
    histogram = Histogram(span)
    histogram.add(values)
    return histogram


def fitted(values: torch.Tensor, observer: str, grid: ActivationGrid = INT8, percentile: float = 99.9):
    return fit_input(grid, look(values), observer, percentile, torch.float32)


@pytest.fixture
def heavy() -> torch.Tensor:
    """Return normal values with a few far out, (tokens, features)."""
    values = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    values[0, 0], values[1, 1] = 300.0, -250.0
    return values


def error(values: torch.Tensor, rounding) -> float:
    return float((rounding.round(values) - values).square().mean())


def test_minmax_holds_everything(heavy):
    rounding = fitted(heavy, "minmax")
    assert rounding.scale == pytest.approx(300 / 127.5)


@pytest.mark.parametrize("observer", ["percentile", "entropy"])
def test_ends_are_cut_off(heavy, observer):
    rounding = fitted(heavy, observer)
    assert rounding.scale * 127 < 20


def test_mse_has_the_least_squared_error(heavy):
    # Without the far values a range of about four standard deviations is best; the far ones must not decide alone.
    body = heavy.clamp(-6, 6)
    best = error(body, fitted(body, "mse"))
    assert best <= min(error(body, fitted(body, other)) for other in ("minmax", "percentile", "entropy")) * 1.01


def test_an_uneven_range_is_used_whole():
    values = torch.rand(1000, 8, generator=torch.Generator().manual_seed(1)) * 10
    even, uneven = fitted(values, "minmax"), fitted(values, "minmax", SHIFTED)
    assert uneven.zero_point == -128
    assert error(values, uneven) < error(values, even) / 3


def test_constant_input_is_exact():
    values = torch.full((5, 3), 2.0)
    for observer in ("minmax", "percentile", "entropy", "mse"):
        assert error(values, fitted(values, observer)) < 1e-4
    assert error(values * 0, fitted(values * 0, "mse")) == 0.0


def test_the_scale_is_one_of_the_stored_dtype(heavy):
    rounding = fit_input(INT8, look(heavy), "mse", 99.9, torch.bfloat16)
    assert float(torch.tensor(rounding.scale).bfloat16()) == rounding.scale
