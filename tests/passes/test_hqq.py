"""HQQ: the solver's promises for every weight, and what it does for a model."""

import pytest
import torch
from families import random_rows
from helpers import open_model
from hypothesis import given, settings
from llmopt.core.passes import PassContext
from llmopt.core.quantized import Grid
from llmopt.models.text import batches
from llmopt.passes.hqq import Hqq, HqqParams
from llmopt.passes.numerics.grid import fit_scales, round_to_nearest
from llmopt.passes.numerics.hqq import Splitting, hqq, shrink
from llmopt.passes.rtn import Rtn, RtnParams
from llmopt.pipeline.sweep import run_sweep
from test_grid import weights


@given(drawn=weights())
@settings(max_examples=100, deadline=None)
def test_never_farther_from_the_weights_than_the_start(drawn):
    w, grid = drawn
    for clip in (False, True):
        start = fit_scales(w, grid, torch.float32, clip=clip)
        made = hqq(w, start, Splitting())
        before = round_to_nearest(w, grid, torch.float32, clip=clip)
        errors = [float((one.dequantize() - w).square().sum()) for one in (made, before)]
        assert errors[0] <= errors[1] * (1 + 1e-4) + 1e-12
        assert made.grid == grid
        assert bool((made.scale > 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_pieces_give_what_the_whole_gives(symmetric, monkeypatch):
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    start = fit_scales(w, Grid(bits=3, group_size=32, symmetric=symmetric), torch.bfloat16)
    whole = hqq(w, start, Splitting())
    monkeypatch.setattr("llmopt.passes.numerics.hqq._WEIGHTS", 96 * 7)
    pieces = hqq(w, start, Splitting())
    assert whole.codes.equal(pieces.codes)
    assert whole.scale.equal(pieces.scale)
    assert whole.scale.dtype == torch.bfloat16


@pytest.mark.parametrize("norm", [0.5, 0.7, 1.0])
def test_the_proximal_operator_minimizes(norm):
    """Against a search: beta / 2 (x - e)^2 + |x|^p / p, the first-order form of which the threshold is."""
    beta = 10.0
    error = torch.linspace(-2, 2, 41)
    got = shrink(error, beta, norm)
    assert bool((got.abs() <= error.abs()).all())
    assert bool((got * error >= 0).all())
    assert bool((got[error.abs() < (1 / beta) ** (1 / (2 - norm))] == 0).all())
    large = error.abs() > 1.5
    assert torch.allclose(got[large], error[large] - error[large].sign() * error[large].abs().pow(norm - 1) / beta)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_nearer_outputs_than_with_rounding_to_nearest(bits, symmetric, family, tmp_path):
    settings = {"bits": bits, "group_size": 32, "symmetric": symmetric}
    models = [open_model(family("llama"), tmp_path / name) for name in ("hqq", "rtn")]
    (result,) = run_sweep(models[0], [Hqq(HqqParams(**settings))], [], PassContext())
    run_sweep(models[1], [Rtn(RtnParams(**settings))], [], PassContext())
    assert sorted(result.changed) == sorted(linear.name for linear in models[0].facts.linears)
    original = open_model(family("llama"), tmp_path / "float").materialize()
    (batch,) = batches(random_rows(8, 48, seed=4), decoder=False)
    with torch.no_grad():
        expected = original(**batch).logits
        errors = [float((one.materialize()(**batch).logits - expected).square().mean()) for one in models]
    assert errors[0] < errors[1]
