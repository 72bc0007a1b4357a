"""Rounded activations: what an engine reads in the place of an input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llmopt.core.activations import ActivationGrid, QuantizedCache, QuantizedInput, round_activations

TOKEN = QuantizedInput(grid=ActivationGrid(number="int8", scale="token"))


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40))
def test_fp8_is_what_a_cast_gives(values):
    given_values = torch.tensor(values)
    cast = given_values.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert round_activations(given_values, torch.tensor(1.0), "fp8").equal(cast)


def test_every_token_has_its_own_scale():
    values = torch.tensor([[0.1, -0.2, 0.05], [100.0, 3.0, -50.0], [0.0, 0.0, 0.0]])
    rounded = TOKEN.round(values)
    steps = values.abs().amax(-1, keepdim=True) / 127.5
    assert bool(((rounded - values).abs() <= steps / 2 + 1e-6 + steps * (values.abs() == values.abs().amax())).all())
    assert rounded[2].equal(values[2])


def test_a_token_does_not_depend_on_its_neighbours():
    values = torch.randn(3, 7, 16)
    assert TOKEN.round(values)[1:2].equal(TOKEN.round(values[1:2]))


def test_a_fixed_scale_cuts_what_is_beyond_it():
    grid = ActivationGrid(number="int8", scale="tensor")
    rounded = QuantizedInput(grid=grid, scale=0.1).round(torch.tensor([100.0, -100.0, 0.26]))
    assert rounded.tolist() == pytest.approx([12.7, -12.8, 0.3])


def test_an_asymmetric_range_holds_zero():
    grid = ActivationGrid(number="int8", scale="tensor", symmetric=False)
    rounding = QuantizedInput(grid=grid, scale=10 / 255, zero_point=-103)
    assert rounding.round(torch.tensor([0.0])).item() == 0.0
    assert rounding.round(torch.tensor([9.0])).item() == pytest.approx(9.0, abs=5 / 255)


def test_keys_and_values_have_scales_of_their_own():
    cache = QuantizedCache(number="int8", key_scale=1.0, value_scale=0.5)
    keys, values = cache.round(torch.tensor([0.4, 1.6]), torch.tensor([0.4, 1.6]))
    assert (keys.tolist(), values.tolist()) == ([0.0, 2.0], [0.5, 1.5])
