"""The figures by which an artifact is judged."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llmopt.evaluation.parity import Comparison, Tolerance, kl_divergence, log_softmax

LOGITS = np.random.default_rng(0).normal(size=(2, 5, 11)).astype(np.float32)


def judged(reference, other, **limits):
    comparison = Comparison()
    comparison.add(reference, other)
    return comparison.result(runtime="r", samples="s", weights_equal=None, tolerance=Tolerance(**limits))


@given(seed=st.integers(0, 1000), spread=st.floats(0.1, 30))
def test_divergence_is_what_torch_computes(seed, spread):
    made = np.random.default_rng(seed)
    first, second = (made.normal(size=(4, 7)) * spread for _ in range(2))
    ours = kl_divergence(first, second)
    logs = [torch.log_softmax(torch.from_numpy(x), -1) for x in (first, second)]
    theirs = torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="none").sum(-1)
    assert ours == pytest.approx(theirs.numpy(), rel=1e-9, abs=1e-12)
    assert (ours >= -1e-12).all()


def test_large_logits_do_not_overflow():
    assert np.isfinite(log_softmax(np.array([[1e5, -1e5, 0.0]]))).all()


def test_equal_outputs_pass():
    parity = judged({"logits": LOGITS}, {"logits": LOGITS.copy()}, max_difference=0.0, mean_kl=0.0)
    assert (parity.passed, parity.positions, parity.top1_agreement) == (True, 10, 1.0)
    assert parity.tolerance == {"max_difference": 0.0, "mean_kl": 0.0}


def test_figures_of_different_outputs():
    other = LOGITS.copy()
    other[0, 0] = np.roll(other[0, 0], 1)
    parity = judged({"logits": LOGITS}, {"logits": other}, mean_kl=1.0)
    assert parity.max_difference == pytest.approx(float(np.abs(LOGITS - other).max()))
    assert parity.mean_kl == pytest.approx(float(kl_divergence(LOGITS[0, :1], other[0, :1])[0]) / 10)
    assert parity.top1_agreement == 0.9


@pytest.mark.parametrize(
    ("limits", "passed"), [({"mean_kl": 1e-9}, False), ({"max_difference": 1e-6}, False), ({}, True)]
)
def test_either_limit_refuses(limits, passed):
    assert judged({"logits": LOGITS}, {"logits": LOGITS + LOGITS**2 / 10}, **limits).passed is passed


def test_a_difference_is_measured_against_the_largest_value():
    large = LOGITS * 1000
    assert judged({"x": large}, {"x": large + 0.5}, max_difference=1e-3).passed
    assert not judged({"x": LOGITS}, {"x": LOGITS + 0.5}, max_difference=1e-3).passed


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_never_passes(value):
    other = LOGITS.copy()
    other[0, 0, 0] = value
    assert not judged({"logits": LOGITS}, {"logits": other}).passed
    assert not judged({"x": LOGITS}, {"x": other}, max_difference=1e9).passed


def test_nothing_compared_is_no_success():
    assert not judged({"logits": LOGITS}, {"other": LOGITS}).passed


def test_unequal_weights_are_no_success():
    comparison = Comparison()
    comparison.add({"logits": LOGITS}, {"logits": LOGITS})
    result = comparison.result(runtime="r", samples="s", weights_equal=False, tolerance=Tolerance())
    assert not result.passed


def test_outputs_of_another_shape_are_an_error():
    with pytest.raises(ValueError, match="logits"):
        Comparison().add({"logits": LOGITS}, {"logits": LOGITS[:, :-1]})


def test_batches_add_up():
    comparison = Comparison()
    other = LOGITS + 0.01 * LOGITS**2
    for index in range(2):
        comparison.add({"logits": LOGITS[index : index + 1]}, {"logits": other[index : index + 1]})
    got = comparison.result(runtime="r", samples="s", weights_equal=None, tolerance=Tolerance())
    whole = judged({"logits": LOGITS}, {"logits": other})
    assert got.mean_kl == pytest.approx(whole.mean_kl)
    assert (got.max_difference, got.positions) == (whole.max_difference, whole.positions)
