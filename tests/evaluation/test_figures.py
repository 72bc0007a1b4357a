"""Figures against naive implementations and scipy's."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmopt.evaluation.figures import f1_macro, ndcg, spearman, tidy, weighted_mean, word_errors
from scipy import stats


@given(seed=st.integers(0, 10**6), size=st.integers(3, 40), kinds=st.integers(2, 12))
def test_spearman_is_scipys(seed, size, kinds):
    made = np.random.default_rng(seed)
    first, second = made.integers(0, kinds, size).astype(float), made.normal(size=size)
    if len(set(first)) < 2:
        assert math.isnan(spearman(first, second))
    else:
        assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)


@given(seed=st.integers(0, 10**6), size=st.integers(1, 40))
def test_f1_counts_each_class_alike(seed, size):
    made = np.random.default_rng(seed)
    expected, predicted = made.integers(0, 4, size), made.integers(0, 5, size)
    scores = []
    for kind in sorted({*expected.tolist(), *predicted.tolist()}):
        both = sum(1 for a, b in zip(expected, predicted, strict=True) if a == b == kind)
        scores.append(2 * both / ((expected == kind).sum() + (predicted == kind).sum()))
    assert f1_macro(expected, predicted) == pytest.approx(sum(scores) / len(scores))


def test_ndcg_by_hand():
    assert ndcg([1, 0, 0], [1], 10) == 1
    assert ndcg([0, 1, 0], [1], 10) == pytest.approx(1 / math.log2(3))
    assert ndcg([0, 2, 1], [1, 2], 10) == pytest.approx((2 / math.log2(3) + 1 / 2) / (2 + 1 / math.log2(3)))
    assert ndcg([0, 0, 1], [1], 2) == 0
    assert ndcg([], [1], 10) == 0


def test_weights_count():
    assert weighted_mean(np.array([1.0, 4.0]), np.array([1, 3])) == pytest.approx(13 / 4)


def test_answers_are_compared_without_their_spaces():
    assert tidy("  forty \n two ") == tidy("forty two") != tidy("fortytwo")


def test_word_errors_are_edits_over_the_words_expected():
    assert word_errors(["the cat sat on the mat"], "the cat sat on the mat") == (0, 6)
    assert word_errors(["the cat sat on the mat"], "the bat sat the mat now") == (3, 6)  # replaced, left out, added
    assert word_errors(["hello"], "hello there you two") == (3, 1)
    assert word_errors(["a b"], "") == (2, 2)
    assert word_errors(["The cat."], "the cat") == (2, 2)
    assert word_errors(["x y z", "one two"], "one  two\n") == (0, 2)


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_word_errors_agree_with_a_naive_recursion(wanted, got):
    def naive(one, other):
        if not one or not other:
            return len(one) + len(other)
        rest = naive(one[1:], other[1:]) + (one[0] != other[0])
        return min(rest, naive(one[1:], other) + 1, naive(one, other[1:]) + 1)

    assert word_errors([" ".join(wanted)], " ".join(got)) == (naive(wanted, got), len(wanted))
