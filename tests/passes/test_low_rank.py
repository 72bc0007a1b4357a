"""The nearest matrix of a rank, for inputs that are not all alike: against a root of their moments, multiplied out."""

import pytest
import torch
from llmopt.passes.numerics.low_rank import factors, length

SHAPES = [(12, 20), (20, 12), (16, 16)]


def moments_of(width, tokens):
    rows = torch.randn(tokens, width) * torch.logspace(-2, 2, width)  # some channels ten thousand times the others
    return rows.T @ rows / tokens


def least(matrix, moments, rank):
    """What no matrix of the rank can go below: the singular values of the error behind a root of the moments."""
    values, vectors = torch.linalg.eigh(moments.double())
    root = vectors * values.clamp(min=0).sqrt()
    return float(torch.linalg.svdvals(matrix.double() @ root)[rank:].norm())


@pytest.mark.parametrize("tokens", [200, 5], ids=["full", "singular"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4])
def test_nothing_of_the_rank_is_nearer_for_these_inputs(shape, rank, tokens):
    torch.manual_seed(0)
    matrix, moments = torch.randn(shape), moments_of(shape[1], tokens)
    up, down = factors(matrix, rank, moments)
    assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
    got = length(matrix - up @ down, moments)
    assert got == pytest.approx(least(matrix, moments, rank), rel=1e-3, abs=1e-4 * length(matrix, moments))
    other_up, other_down = factors(matrix, rank)
    assert got < length(matrix - other_up @ other_down, moments)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_moments_it_is_the_truncated_decomposition(shape):
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    up, down = factors(matrix, 3)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(up @ down, (left[:, :3] * values[:3]) @ right[:3], atol=1e-4)
    assert length(matrix - up @ down) == pytest.approx(float(values[3:].norm()), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rank_that_is_not_needed_stays_zero(shape):
    torch.manual_seed(2)
    matrix = torch.randn(shape)
    up, down = factors(matrix, 24)
    assert (up.shape, down.shape) == ((shape[0], 24), (24, shape[1]))
    assert not up[:, min(shape) :].any()
    assert not down[min(shape) :].any()
    assert torch.allclose(up @ down, matrix, atol=1e-5)


def test_both_factors_take_the_same_share():
    torch.manual_seed(3)
    up, down = factors(100 * torch.randn(8, 30), 4, moments_of(30, 100))
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-4)


def test_a_direction_that_is_empty_makes_no_nan():
    matrix = torch.zeros(6, 8)
    matrix[2, 3] = 1.0
    up, down = factors(matrix, 4)
    assert bool(torch.isfinite(up).all() & torch.isfinite(down).all())
    assert torch.allclose(up @ down, matrix, atol=1e-6)


def test_length_is_that_of_the_product():
    torch.manual_seed(4)
    matrix, rows = torch.randn(5, 7), torch.randn(50, 7)
    moments = rows.T @ rows / 50
    assert length(matrix, moments) == pytest.approx(float((rows @ matrix.T).square().sum(1).mean().sqrt()), rel=1e-5)
