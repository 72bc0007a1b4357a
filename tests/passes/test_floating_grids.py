"""Grids of small floating-point numbers: what codes stand for, and that each scale is a number of its own kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt.core.quantized import E2M1, E4M3, Grid
from llmopt.passes.numerics.gptq import gptq
from llmopt.passes.numerics.grid import decode, encode, fit_scales, nearest_number, round_to_nearest
from llmopt.passes.numerics.hessian import Hessian, factorize

FP8 = Grid(bits=8, group_size="channel", symmetric=True, number="fp8")
NVFP4 = Grid(bits=4, group_size=16, symmetric=True, number="nvfp4")
MXFP4 = Grid(bits=4, group_size=32, symmetric=True, number="mxfp4")
BLOCKS = Grid(bits=8, group_size="block", symmetric=True, number="fp8")


def weight(rows: int = 48, columns: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_tables_are_those_of_the_hardware_formats():
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(torch.tensor(E4M3).nan_to_num(-1), codes.view(torch.float8_e4m3fn).float().nan_to_num(-1))
    assert E2M1[:8] == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    assert E2M1[8:] == tuple(-value for value in E2M1[:8])


@pytest.mark.parametrize("grid", [FP8, NVFP4])
def test_every_number_is_its_own_nearest_and_comes_back_from_its_code(grid):
    numbers = torch.tensor([value for value in grid.values if value == value])
    assert torch.equal(nearest_number(numbers, grid.number), numbers)
    assert torch.equal(decode(encode(numbers, grid), grid), numbers)


@given(st.floats(-500, 500))
def test_nearest_e2m1_is_nearest(value):
    found = float(nearest_number(torch.tensor([value]), "nvfp4"))
    assert abs(found - value) <= min(abs(one - value) for one in E2M1) * (1 + 1e-6)


def test_ties_go_to_the_even_number():
    halfway = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert nearest_number(halfway, "mxfp4").tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


@pytest.mark.parametrize("grid", [FP8, NVFP4, MXFP4, BLOCKS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_half_a_step(grid, dtype):
    w = weight(128, 256)
    quantized = round_to_nearest(w, grid, dtype)
    error = (quantized.dequantize(torch.float32) - w).abs()
    # Half the widest step: an eighth of the largest e4m3 number's octave, a third of 6 for e2m1; 7 is cut to 6.
    top = w.abs().max()
    assert float(error.max()) <= float(top) * {"fp8": 1 / 16, "nvfp4": 0.2, "mxfp4": 0.26}[grid.number]
    assert quantized.scale.dtype is dtype


def test_scales_of_nvfp4_are_e4m3_numbers_with_the_largest_used():
    quantized = round_to_nearest(weight(), NVFP4, torch.bfloat16)
    assert set(quantized.scale.float().unique().tolist()) <= set(E4M3)
    assert float(quantized.scale.max()) == 448.0
    assert quantized.divisor is not None


def test_scales_of_mxfp4_are_powers_of_two():
    scale = round_to_nearest(weight(), MXFP4, torch.bfloat16).scale.float()
    assert torch.equal(scale.frexp().mantissa, torch.full_like(scale, 0.5))


@pytest.mark.parametrize(("top", "scale"), [(4.0, 1.0), (6.99, 1.0), (7.0, 2.0), (3.6, 1.0), (3.4, 0.5)])
def test_mxfp4_goes_up_where_the_largest_weight_would_be_cut_to_much(top, scale):
    w = torch.zeros(1, 32)
    w[0, 0] = top
    assert float(fit_scales(w, MXFP4, torch.float32).scale) == scale


def test_layers_that_share_a_divisor_have_it_from_the_largest():
    alone = round_to_nearest(weight(seed=1), NVFP4, torch.float32)
    shared = round_to_nearest(weight(seed=1), NVFP4, torch.float32, largest=100.0)
    assert float(shared.divisor) == pytest.approx(448 * 6 / 100)
    assert float(alone.divisor) > float(shared.divisor)


@pytest.mark.parametrize("grid", [FP8, NVFP4, MXFP4])
def test_zeros_stay_zeros(grid):
    quantized = round_to_nearest(torch.zeros(4, 64), grid, torch.bfloat16)
    assert not quantized.dequantize().any()
    assert bool(torch.isfinite(quantized.scale).all())


@pytest.mark.parametrize("grid", [FP8, NVFP4, MXFP4, BLOCKS])
def test_clip_never_hurts_and_gptq_beats_rounding(grid):
    w = weight(128, 256, seed=3)
    x = torch.randn(2000, 256, generator=torch.Generator().manual_seed(4)) @ weight(256, 256, seed=5)
    plain = round_to_nearest(w, grid, torch.float32)
    clipped = round_to_nearest(w, grid, torch.float32, clip=True)
    assert (clipped.dequantize() - w).square().sum() <= (plain.dequantize() - w).square().sum() * (1 + 1e-6)
    hessian = Hessian(256)
    hessian.add(x)
    factor = factorize(hessian.matrix, damping=0.01, act_order=True)
    assert factor is not None
    made, _ = gptq(w, factor, grid, torch.float32)

    def error(quantized):
        return float((x @ (quantized.dequantize() - w).T).square().mean())

    assert error(made) < 0.8 * error(plain)
    if grid is not BLOCKS:
        assert made.scale.equal(plain.scale)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([FP8, NVFP4, MXFP4]), st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_rows_dequantize_as_the_whole(grid, rows, groups, seed):
    quantized = round_to_nearest(weight(rows, 32 * groups, seed), grid, torch.bfloat16)
    assert quantized.rows(0, rows).dequantize().equal(quantized.dequantize())
    assert quantized.rows(rows - 1, rows).dequantize().equal(quantized.dequantize()[rows - 1 :])
