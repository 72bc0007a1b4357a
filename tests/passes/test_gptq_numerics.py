"""GPTQ's mathematics against a slow reference, and against rounding to nearest."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt.core.quantized import BITS, Grid
from llmopt.passes.numerics import hessian as hessian_module
from llmopt.passes.numerics.gptq import gptq
from llmopt.passes.numerics.grid import fit_scales, round_to_nearest
from llmopt.passes.numerics.hessian import Hessian, factorize

GRIDS = [
    Grid(bits=bits, group_size=size, symmetric=symmetric)
    for bits in BITS
    for size in (16, "channel", "tensor")
    for symmetric in (True, False)
]


def inputs(tokens=256, width=48, seed=0, rank=12):
    """Return correlated inputs, some columns far louder than others, as activations of language models are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank, width, generator=generator)
    loud = torch.exp(torch.randn(width, generator=generator))
    noise = 0.3 * torch.randn(tokens, width, generator=generator)
    return (torch.randn(tokens, rank, generator=generator) @ mixing + noise) * loud


def weight(rows=24, width=48, seed=1):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.1


def hessian(rows):
    made = Hessian(rows.shape[1])
    made.add(rows)
    return made.matrix


def error(w, quantized, matrix):
    """Return the Hessian-weighted squared error of the product."""
    gap = (w - quantized.dequantize(torch.float32)).double()
    return float(((gap @ matrix.double()) * gap).sum())


def reference_codes(w, matrix, grid, *, damping, act_order):
    """Quantize a column, spread its error by the inverse of what is left of the Hessian, eliminate it: O(n^3) each."""
    n = w.shape[1]
    damped = matrix.double() + damping * float(matrix.diagonal().mean()) * torch.eye(n, dtype=torch.float64)
    scale, zero = (part.double().expand_as(w) for part in fit_scales(w, grid, torch.float32).columns(n))
    order = torch.argsort(matrix.diagonal(), descending=True, stable=True) if act_order else torch.arange(n)
    work, left = w.double().clone(), order.tolist()
    codes = torch.zeros(w.shape, dtype=torch.uint8)
    while left:
        column = left[0]
        inverse = torch.linalg.inv(damped[left][:, left])
        code = (work[:, column] / scale[:, column]).round().add(zero[:, column]).clamp(0, grid.levels - 1)
        codes[:, column] = code.to(torch.uint8)
        gap = (work[:, column] - (code - zero[:, column]) * scale[:, column]) / inverse[0, 0]
        work[:, left] -= gap.unsqueeze(1) * inverse[0].unsqueeze(0)
        left = left[1:]
    return codes


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("act_order", [True, False], ids=["act-order", "left-to-right"])
def test_codes_equal_a_slow_reference(grid, act_order):
    w, matrix = weight(), hessian(inputs())
    expected = reference_codes(w, matrix, grid, damping=0.05, act_order=act_order)
    factor = factorize(matrix.clone(), damping=0.05, act_order=act_order)
    quantized, _ = gptq(w, factor, grid, torch.float32, refits=0)
    # A group's largest weight lies halfway between two codes of a symmetric grid, where float32 and float64 may part;
    # what follows it in its row then parts too.
    assert int((quantized.codes != expected).any(1).sum()) <= 1


def test_more_columns_than_a_batch_of_columns():
    w, matrix = weight(8, 160), hessian(inputs(400, 160))
    grid = Grid(bits=4, group_size=32, symmetric=True)
    expected = reference_codes(w, matrix, grid, damping=0.05, act_order=True)
    quantized, _ = gptq(w, factorize(matrix.clone(), damping=0.05, act_order=True), grid, torch.float32, refits=0)
    assert float((quantized.codes != expected).float().mean()) <= 0.01


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("act_order", [True, False], ids=["act-order", "left-to-right"])
def test_the_product_is_nearer_than_with_rounding_to_nearest(grid, act_order):
    w, matrix = weight(), hessian(inputs())
    nearest = error(w, round_to_nearest(w, grid, torch.float32), matrix)
    errors = []
    for prefits, refits in ((0, 0), (2, 0), (2, 3)):
        factor = factorize(matrix.clone(), damping=0.01, act_order=act_order)
        quantized, told = gptq(w, factor, grid, torch.float32, prefits=prefits, refits=refits)
        errors.append(error(w, quantized, matrix))
        assert float(told.sum()) == pytest.approx(error(w, quantized, factor.hessian), rel=1e-3)
    assert max(errors) < nearest
    if grid.group_size != "tensor":
        assert errors[0] < 0.8 * nearest


@given(seed=st.integers(0, 10_000), bits=st.sampled_from(BITS), symmetric=st.booleans(), clip=st.booleans())
@settings(max_examples=25, deadline=None)
def test_refitting_never_makes_it_worse(seed, bits, symmetric, clip):
    w, matrix = weight(8, 32, seed), hessian(inputs(64, 32, seed + 1))
    grid = Grid(bits=bits, group_size=16, symmetric=symmetric)
    told = [
        gptq(w, factorize(matrix.clone(), damping=0.01, act_order=True), grid, torch.float32, clip=clip, refits=refits)[
            1
        ]
        for refits in (0, 1, 4)
    ]
    for before, after in pairwise(told):
        assert bool((after <= before * (1 + 1e-5)).all())


@pytest.mark.parametrize("size", [16, 128, "channel", "tensor"])
def test_fitting_scales_before_rounding_pays_on_a_coarse_grid(size):
    matrix, w = hessian(inputs(2048, 256)), weight(64, 256)
    grid = Grid(bits=2, group_size=size, symmetric=True)
    factor = factorize(matrix, damping=0.01, act_order=True)
    errors = [float(gptq(w, factor, grid, torch.float32, prefits=prefits)[1].sum()) for prefits in (0, 1, 2)]
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scales(dtype):
    w, matrix = weight(), hessian(inputs())
    grid = Grid(bits=4, group_size=16, symmetric=True)
    quantized, _ = gptq(w, factorize(matrix.clone(), damping=0.01, act_order=True), grid, dtype, refits=3)
    assert quantized.scale.dtype == dtype
    assert error(w, quantized, matrix) < error(w, round_to_nearest(w, grid, dtype), matrix)


def test_hessian_is_the_mean_over_all_tokens():
    rows = inputs()
    parts = Hessian(rows.shape[1])
    for part in rows.split(37):
        parts.add(part)
    parts.add(rows[:0])
    assert parts.tokens == len(rows)
    expected = (rows.double().T @ rows.double()) / len(rows)
    assert torch.allclose(parts.matrix.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_layers_stacked_by_rows_round_as_each_alone():
    matrix = hessian(inputs())
    first, second = weight(seed=1), weight(seed=2)
    grid = Grid(bits=3, group_size=16, symmetric=False)
    factor = factorize(matrix, damping=0.01, act_order=True)
    together, _ = gptq(torch.cat([first, second]), factor, grid, torch.float32)
    apart = [gptq(w, factor, grid, torch.float32)[0].codes for w in (first, second)]
    assert together.codes.equal(torch.cat(apart))


class TestDamping:
    def test_as_asked_for_when_that_suffices(self):
        factor = factorize(hessian(inputs()), damping=0.01, act_order=True)
        assert (factor.damping, factor.double, factor.dead) == (0.01, False, 0)

    def test_none_at_all_when_none_is_needed(self):
        factor = factorize(hessian(inputs()), damping=0.0, act_order=True)
        assert factor.damping == 0

    def test_rises_for_a_singular_hessian(self):
        one = torch.ones(4, 32)
        factor = factorize(hessian(one), damping=0.0, act_order=False)
        assert factor is not None
        assert 0 < factor.damping <= 0.1
        w = weight(8, 32)
        grid = Grid(bits=4, group_size=16, symmetric=True)
        quantized, _ = gptq(w, factor, grid, torch.float32)
        matrix = hessian(one)
        assert error(w, quantized, matrix) < error(w, round_to_nearest(w, grid, torch.float32), matrix)

    def test_float64_where_float32_never_succeeds(self, monkeypatch):
        honest = hessian_module._cholesky
        monkeypatch.setattr(
            hessian_module,
            "_cholesky",
            lambda matrix, order, double: honest(matrix, order, double=double) if double else None,
        )
        factor = factorize(hessian(inputs()), damping=0.01, act_order=True)
        assert factor.double
        assert factor.feedback.dtype == torch.float32
        assert factor.damping == 0.01

    def test_gives_up_rather_than_guess(self, monkeypatch):
        monkeypatch.setattr(hessian_module, "_cholesky", lambda *_, **__: None)
        assert factorize(hessian(inputs()), damping=0.01, act_order=True) is None

    def test_nothing_to_go_by(self):
        assert factorize(hessian(torch.zeros(8, 16)), damping=0.01, act_order=True) is None

    @pytest.mark.parametrize("act_order", [True, False])
    def test_dead_columns_are_counted_and_rounded_to_nearest(self, act_order):
        rows = inputs()
        rows[:, [3, 17]] = 0
        w, grid = weight(), Grid(bits=4, group_size=16, symmetric=True)
        factor = factorize(hessian(rows), damping=0.01, act_order=act_order)
        assert factor.dead == 2
        quantized, _ = gptq(w, factor, grid, torch.float32)
        nearest = round_to_nearest(w, grid, torch.float32)
        assert quantized.codes[:, [3, 17]].equal(nearest.codes[:, [3, 17]])
        assert bool(torch.isfinite(quantized.dequantize()).all())


def test_same_result_twice_and_with_two_threads():
    w, rows = weight(64, 128), inputs(512, 128)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            factor = factorize(hessian(rows), damping=0.01, act_order=True)
            results.append(gptq(w, factor, Grid(bits=4, group_size=32, symmetric=True), torch.float32, refits=3)[0])
    finally:
        torch.set_num_threads(before)
    assert results[0].codes.equal(results[1].codes)
    assert results[0].scale.equal(results[1].scale)
    # More threads may sum in another order; what they make of it must be as good.
    matrix = hessian(rows)
    assert error(w, results[2], matrix) == pytest.approx(error(w, results[0], matrix), rel=0.02)
