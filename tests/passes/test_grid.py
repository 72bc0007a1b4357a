"""Choosing scales and rounding: bounds that hold for every weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt.core.quantized import BITS, Grid
from llmopt.passes.numerics.grid import fit_scales, round_to, round_to_nearest

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def weights(draw):
    """Return a weight and a grid whose groups tile it; zero groups, one-sided groups and outliers included."""
    size = draw(st.sampled_from([1, 3, 8, 16, "channel", "tensor"]))
    groups = draw(st.integers(1, 4))
    columns = groups * size if isinstance(size, int) else draw(st.integers(1, 33))
    rows = draw(st.integers(1, 9))
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    kind = draw(st.sampled_from(["plain", "zero rows", "positive", "negative", "outlier", "tiny"]))
    if kind == "zero rows":
        w[::2] = 0
    elif kind in {"positive", "negative"}:
        w = w.abs() + 1 if kind == "positive" else -w.abs() - 1
    elif kind == "outlier":
        w[0, 0] = 100
    elif kind == "tiny":
        w *= 1e-5
    return w, Grid(bits=draw(st.sampled_from(BITS)), group_size=size, symmetric=draw(st.booleans()))


def steps_of(quantized):
    """Return the scale of every weight, float32."""
    rows, columns = quantized.shape
    scale = quantized.scale.float()
    return scale.expand(rows, -1).repeat_interleave(columns // scale.shape[1], 1)


@given(drawn=weights())
@settings(max_examples=200, deadline=None)
def test_an_error_is_at_most_half_a_step(drawn):
    w, grid = drawn
    quantized = round_to_nearest(w, grid, torch.float32)
    step = steps_of(quantized)
    gap = (w - quantized.dequantize()).abs()
    if grid.symmetric:
        # The grid reaches from -2^(b-1) to 2^(b-1) - 1: the largest positive weight is half a step beyond it.
        assert bool((gap <= step * 0.5001 + 1e-30).all())
    else:
        # The zero point is rounded too, which moves the range by up to half a step.
        assert bool((gap <= step * 1.0001 + 1e-30).all())
        inside = (quantized.codes > 0) & (quantized.codes < grid.levels - 1)
        assert bool((gap[inside] <= step[inside] * 0.5001).all())


@given(drawn=weights(), dtype=st.sampled_from(DTYPES))
@settings(max_examples=100, deadline=None)
def test_the_nearest_point_of_the_grid_is_taken(drawn, dtype):
    w, grid = drawn
    scales = fit_scales(w, grid, dtype)
    codes = round_to(w, scales).to(torch.uint8)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < grid.levels
    scale, zero = (part.expand_as(w).unsqueeze(-1) for part in scales.columns(w.shape[1]))
    points = (torch.arange(grid.levels) - zero) * scale
    nearest = (points - w.unsqueeze(-1)).abs().amin(-1)
    taken = (points.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1) - w).abs()
    assert bool((taken <= nearest * (1 + 1e-4) + scale.squeeze(-1) * 1e-4).all())


@given(drawn=weights())
@settings(max_examples=100, deadline=None)
def test_zero_stays_zero(drawn):
    w, grid = drawn
    w = w.clone()
    w[:, 0] = 0
    assert bool((round_to_nearest(w, grid, torch.float32).dequantize()[:, 0] == 0).all())


@given(drawn=weights(), dtype=st.sampled_from(DTYPES))
@settings(max_examples=100, deadline=None)
def test_quantizing_twice_changes_nothing_where_the_range_is_kept(drawn, dtype):
    w, grid = drawn
    scales = fit_scales(w, grid, dtype)
    once = scales.weight(round_to(w, scales))
    assert round_to(once.dequantize(torch.float32), scales).to(torch.uint8).equal(once.codes)


@given(drawn=weights(), dtype=st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_searching_the_range_never_makes_it_worse(drawn, dtype):
    w, grid = drawn
    whole, searched = (round_to_nearest(w, grid, dtype, clip=clip).dequantize(torch.float32) for clip in (False, True))
    assert float((w - searched).square().sum()) <= float((w - whole).square().sum()) * (1 + 1e-5)


def test_searching_the_range_gives_way_to_outliers_only():
    torch.manual_seed(0)
    w = torch.randn(4, 64)
    w[0, 0] = 6.0
    grid = Grid(bits=3, group_size=64, symmetric=True)
    whole, searched = fit_scales(w, grid, torch.float32), fit_scales(w, grid, torch.float32, clip=True)
    assert float(searched.scale[0]) < float(whole.scale[0])
    loud = torch.ones(64)
    loud[0] = 1e6
    kept = fit_scales(w, grid, torch.float32, clip=True, importance=loud)
    assert float(kept.scale[0]) == pytest.approx(float(whole.scale[0]), rel=0.2)


def test_scales_are_rounded_before_anything_is_rounded_with_them():
    torch.manual_seed(0)
    w = torch.randn(8, 64) * 0.37
    quantized = round_to_nearest(w, Grid(bits=4, group_size=32, symmetric=True), torch.bfloat16)
    exact = (quantized.codes.float().reshape(8, 2, 32) - 8) * quantized.scale.float().unsqueeze(-1)
    assert quantized.dequantize(torch.float32).equal(exact.reshape(8, 64))
    assert quantized.dequantize().equal(exact.reshape(8, 64).to(torch.bfloat16))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_is_exact(symmetric):
    grid = Grid(bits=4, group_size=16, symmetric=symmetric)
    quantized = round_to_nearest(torch.zeros(2, 32), grid, torch.float16)
    assert bool((quantized.dequantize() == 0).all())
    assert bool(torch.isfinite(quantized.scale).all())
