"""Masks against counting, SparseGPT against the textbook with an explicit inverse, GPTQ on what is sparse."""

import pytest
import torch
from helpers import grid
from llmopt.passes.numerics.autoround import Rounding
from llmopt.passes.numerics.gptq import gptq
from llmopt.passes.numerics.hessian import Hessian, factorize
from llmopt.passes.numerics.sparsity import Pattern, holds, magnitude_mask, most_in_group, sparsegpt, wanda_mask

TWO_OF_FOUR, FOUR_OF_EIGHT = Pattern(2, 4), Pattern(4, 8)


def inputs(tokens=600, width=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator) / width**0.5
    scales = torch.rand(width, generator=generator) * 3 + 0.1
    return torch.randn(tokens, width, generator=generator) @ mixed * scales


def factor_of(rows, damping=0.01):
    hessian = Hessian(rows.shape[1])
    hessian.add(rows)
    made = factorize(hessian.matrix.clone(), damping=damping, act_order=False)
    assert made is not None
    return made


def weights(rows=24, columns=64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7))


def naive(weight, rows, share, pattern, *, damping=0.01, block=128):
    """SparseGPT as its paper has it: the inverse Hessian's Cholesky factor, columns from left to right."""
    hessian = (rows.double().T @ rows.double()) / len(rows)
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left = weight.double().clone()
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        errors = torch.zeros(len(weight), stop - start, dtype=torch.float64)
        pivots = inverse.diagonal()[start:stop]
        if pattern is None:
            cost = (left[:, start:stop] / pivots) ** 2
            gone = torch.zeros(cost.numel(), dtype=torch.bool)
            gone[cost.flatten().argsort()[: round(share * cost.numel())]] = True
            gone = gone.view_as(cost)
        else:
            gone = torch.zeros(len(weight), stop - start, dtype=torch.bool)
        for column in range(start, stop):
            if pattern is not None and column % pattern.group == 0:
                group = slice(column, column + pattern.group)
                cost = (left[:, group] / inverse.diagonal()[group]) ** 2
                order = cost.argsort(1)[:, : pattern.group - pattern.kept]
                gone[:, column - start : column - start + pattern.group].scatter_(1, order, True)
            made = left[:, column].clone()
            made[gone[:, column - start]] = 0
            error = (left[:, column] - made) / inverse[column, column]
            left[:, column:stop] -= error.unsqueeze(1) * inverse[column, column:stop]
            left[:, column] = made
            errors[:, column - start] = error
        left[:, stop:] -= errors @ inverse[start:stop, stop:]
    return left.float()


@pytest.mark.parametrize("pattern", [None, TWO_OF_FOUR, FOUR_OF_EIGHT])
@pytest.mark.parametrize("width", [64, 160])
def test_sparsegpt_is_the_papers(pattern, width):
    rows, weight = inputs(width=width), weights(columns=width)
    made = sparsegpt(weight, factor_of(rows), 0.5, pattern)
    expected = naive(weight, rows, 0.5, pattern)
    assert (made != 0).equal(expected != 0)
    torch.testing.assert_close(made, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("pattern", [None, TWO_OF_FOUR, FOUR_OF_EIGHT])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_each_method_loses_less_of_the_output_than_the_one_before(pattern, share):
    if pattern is not None and share != 0.5:
        return
    rows, weight = inputs(), weights()
    made = {
        "magnitude": weight * magnitude_mask(weight, share, pattern),
        "wanda": weight * wanda_mask(weight, rows.square().mean(0), share, pattern),
        "sparsegpt": sparsegpt(weight, factor_of(rows), share, pattern),
    }
    errors = {name: float((rows @ (one - weight).T).square().mean()) for name, one in made.items()}
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]
    for one in made.values():
        assert one.count_nonzero() == pytest.approx((1 - share) * one.numel(), abs=2)
        if pattern is not None:
            assert holds(one, pattern)


def test_masks_count_exactly():
    weight = weights(10, 48)
    assert int((~magnitude_mask(weight, 0.3, None)).sum()) == 144
    mask = wanda_mask(weight, torch.ones(48), 0.25, None)
    assert (~mask).sum(1).tolist() == [12] * 10
    for row, kept in zip(weight.abs(), mask, strict=True):
        assert float(row[kept].min()) >= float(row[~kept].max())
    for pattern in (TWO_OF_FOUR, FOUR_OF_EIGHT):
        groups = magnitude_mask(weight, 0.5, pattern).reshape(10, -1, pattern.group)
        assert groups.sum(-1).eq(pattern.kept).all()


def test_wanda_weighs_inputs():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    mask = wanda_mask(weight, torch.tensor([100.0, 1.0, 1.0, 0.0]), 0.5, None)
    assert mask.tolist() == [[True, False, True, False]]


def test_a_group_with_too_many_is_seen():
    weight = torch.tensor([[1.0, 0, 0, 1, 1, 1, 1, 0]])
    assert most_in_group(weight, TWO_OF_FOUR) == 3
    assert not holds(weight, TWO_OF_FOUR)
    assert most_in_group(weight, FOUR_OF_EIGHT) == 5


def test_a_dense_share_of_nothing_leaves_the_weight():
    rows, weight = inputs(), weights()
    torch.testing.assert_close(sparsegpt(weight, factor_of(rows), 0.0, None), weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_keeps_zeros_and_is_no_worse_than_rounding_to_nearest(symmetric, bits):
    from llmopt.passes.numerics.grid import round_to_nearest

    rows = inputs()
    weight = sparsegpt(weights(), factor_of(rows), 0.5, TWO_OF_FOUR)
    mask, factor, on = weight != 0, factor_of(rows), grid(bits, 32, symmetric)
    made, errors = gptq(weight, factor, on, torch.float32, prefits=1, refits=2, mask=mask)
    got = made.dequantize()
    assert got[~mask].eq(0).all()
    plain = round_to_nearest(weight, on, torch.float32).dequantize()

    def error(one):
        return float((rows @ (one - weight).T).square().mean())

    assert error(got) < error(plain)
    assert holds(got, TWO_OF_FOUR)
    damped = factor.hessian
    expected = (((got - weight) @ damped) * (got - weight)).sum(1)
    torch.testing.assert_close(errors, expected, atol=1e-3, rtol=1e-3)


def test_without_a_mask_gptq_fills_zeros():
    """The mask is needed: compensation alone would put weights where there were none."""
    rows = inputs()
    weight = sparsegpt(weights(), factor_of(rows), 0.5, TWO_OF_FOUR)
    made, _ = gptq(weight, factor_of(rows), grid(4, 32), torch.float32)
    assert made.dequantize()[weight == 0].count_nonzero() > 0


def test_learnt_rounding_keeps_zeros():
    weight = weights()
    weight[:, ::2] = 0
    rounding = Rounding(weight, grid(3, 32, symmetric=False), torch.float32, mask=weight != 0)
    for _ in range(5):
        rounding.weight().square().sum().sub(30).abs().backward()
        for parameter in rounding.parameters:
            assert parameter.grad is not None
        rounding.step(0.3)
    assert rounding.weight()[:, ::2].eq(0).all()
    assert rounding.quantized().dequantize()[:, ::2].eq(0).all()
