"""Rotations of any width: orthogonal, flat where a Hadamard matrix exists, and the same for the same seed."""

import pytest
import torch
from llmopt.passes.numerics.hadamard import Rotation, factors, paley, random_orthogonal, sylvester

WIDTHS = (1, 2, 3, 5, 64, 96, 100, 104, 128, 224, 360)
FLAT = (1, 2, 64, 96, 128, 224, 360)


def dense(rotation):
    return rotation.turn(torch.eye(rotation.width, dtype=torch.float64))


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_orthogonal(width):
    matrix = dense(Rotation(width, 3))
    assert float((matrix @ matrix.T - torch.eye(width)).abs().max()) < 1e-11


@pytest.mark.parametrize("width", FLAT)
def test_no_channel_stands_out_of_another(width):
    matrix = dense(Rotation(width, 3))
    assert float((matrix.abs() - width**-0.5).abs().max()) < 1e-12


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_turned_as_by_the_whole_matrix(width):
    torch.manual_seed(0)
    rotation, rows = Rotation(width, 1), torch.randn(2, 5, width)
    turned = rotation.turn(rows)
    assert (turned.shape, turned.dtype) == (rows.shape, torch.float64)
    assert float((turned - rows.double() @ dense(rotation)).abs().max()) < 1e-12


def test_it_is_the_kronecker_product_of_its_factors_under_random_signs():
    parts = factors(96, torch.Generator().manual_seed(0))
    assert [len(part) for part in parts] == [12, 8]
    plain = torch.kron(parts[0], parts[1])
    matrix = dense(Rotation(96, 7))
    signs = (matrix * plain).sum(1)
    assert float((signs.abs() - 1).abs().max()) < 1e-12
    assert float((matrix - signs.unsqueeze(1) * plain).abs().max()) < 1e-12
    assert 20 < int((signs > 0).sum()) < 76


def test_a_seed_tells_the_rotation():
    for width in (64, 100):
        assert dense(Rotation(width, 5)).equal(dense(Rotation(width, 5)))
        assert not dense(Rotation(width, 5)).equal(dense(Rotation(width, 6)))


@pytest.mark.parametrize("size", [4, 8, 12, 20, 24, 28, 36, 44, 60, 180])
def test_paleys_matrices_are_hadamard_matrices(size):
    matrix = paley(size)
    assert matrix is not None
    assert bool((matrix.abs() == 1).all())
    assert (matrix @ matrix.T).equal(size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 6, 7, 52, 92])
def test_there_is_none_of_other_sizes(size):
    assert paley(size) is None


def test_sylvesters_matrix():
    assert sylvester(2).tolist() == [[1, 1], [1, -1]]
    matrix = sylvester(16)
    assert (matrix @ matrix.T).equal(16 * torch.eye(16, dtype=torch.float64))


def test_a_random_orthogonal_matrix():
    matrix = random_orthogonal(7, torch.Generator().manual_seed(0))
    assert float((matrix @ matrix.T - torch.eye(7)).abs().max()) < 1e-12
