"""Figures of a set of samples: what is right, how well orders agree, how well documents are found. Pure, in numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def weighted_mean(values: Array, weights: Array | None = None) -> float:
    """Return the mean, each value counted as often as its weight says."""
    if weights is None:
        return float(values.mean())
    return float((values * weights).sum() / weights.sum())


def f1_macro(expected: Array, predicted: Array) -> float:
    """Return F1 of each class that occurs, averaged with equal weight.

    Args:
        expected: the classes, as numbers, (samples,).
        predicted: those that were found.
    """
    import numpy as np

    classes = int(max(expected.max(), predicted.max())) + 1
    right = np.bincount(expected[expected == predicted], minlength=classes)
    both = np.bincount(expected, minlength=classes) + np.bincount(predicted, minlength=classes)
    occurs = both > 0
    return float((2 * right[occurs] / both[occurs]).mean())


def spearman(first: Array, second: Array) -> float:
    """Return the rank correlation; equal values share their mean rank. NaN where one side has no order at all."""
    one, other = (_ranks(values) for values in (first, second))
    one, other = one - one.mean(), other - other.mean()
    scale = math.sqrt(float((one * one).sum() * (other * other).sum()))
    return float((one * other).sum()) / scale if scale else math.nan


def _ranks(values: Array) -> Array:
    import numpy as np

    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[places]


def ndcg(gains: Sequence[float], ideal: Sequence[float], depth: int) -> float:
    """Return the normalized discounted cumulative gain (Järvelin and Kekäläinen 2002) of one ranking.

    Args:
        gains: relevance of the documents, best-ranked first.
        ideal: relevance of all relevant documents, in any order.
        depth: how many ranks count.
    """
    best = _dcg(sorted(ideal, reverse=True)[:depth])
    return _dcg(gains[:depth]) / best if best else 0.0


def _dcg(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains))


def word_errors(expected: Sequence[str], written: str) -> tuple[int, int]:
    """Return how many words must be replaced, left out or put in to make an expected text, and how many it has.

    One over the other is the word error rate. Of several expected texts the nearest counts. Words are what white space
    divides; case and punctuation count.
    """
    found = [(_edits(text.split(), written.split()), len(text.split())) for text in expected]
    return min(found, key=lambda one: one[0] / max(1, one[1]))


def _edits(wanted: Sequence[str], got: Sequence[str]) -> int:
    """Return the distance of two sequences (Levenshtein 1966), row by row."""
    row = list(range(len(got) + 1))
    for place, word in enumerate(wanted, 1):
        corner, row[0] = row[0], place
        for at, other in enumerate(got, 1):
            corner, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, corner + (word != other))
    return row[-1]


def tidy(text: str) -> str:
    """Return a text as answers are compared: without white space at its ends, and one space for any within."""
    return " ".join(text.split())
