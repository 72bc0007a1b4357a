"""Which weights become zero, and what the others become then.

Magnitude: the smallest of a layer. Wanda (Sun, Liu, Bair and Kolter, 2023, "A Simple and Effective Pruning Approach for
Large Language Models"): the smallest |weight| times the length of its input over calibration tokens, row by row.
SparseGPT (Frantar and Alistarh, 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot"):
column after column, each error made up for in the columns still to come, as GPTQ does and with the same Cholesky
factor; the weight whose absence costs least is the one with the smallest (pivot · weight)², given the columns before.

A pattern n:m leaves at most n of every m neighbouring weights of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .hessian import Factor

_COLUMNS = 128
"""Columns that are chosen among at a time, as in SparseGPT; a multiple of every pattern's m."""


class Pattern(NamedTuple):
    """At most `kept` of every `group` neighbouring weights of a row are not zero."""

    kept: int
    group: int


def magnitude_mask(weight: Tensor, sparsity: float, pattern: Pattern | None) -> Tensor:
    """Return which weights stay, (out_features, in_features) bool.

    Args:
        weight: (out_features, in_features).
        sparsity: share of the layer's weights that go; a pattern has its own.
        pattern: n:m, None for no pattern.
    """
    if pattern is not None:
        return _grouped_mask(weight.abs(), pattern)
    return _highest(weight.abs().reshape(1, -1), sparsity).view_as(weight)


def wanda_mask(weight: Tensor, energy: Tensor, sparsity: float, pattern: Pattern | None) -> Tensor:
    """Return which weights stay; see `magnitude_mask`.

    Args:
        weight: (out_features, in_features).
        energy: mean square of each input, (in_features,).
        sparsity: share of each row's weights that go.
        pattern: n:m, None for no pattern.
    """
    scores = weight.abs() * energy.sqrt()
    return _highest(scores, sparsity) if pattern is None else _grouped_mask(scores, pattern)


def sparsegpt(weight: Tensor, factor: Factor, sparsity: float, pattern: Pattern | None) -> Tensor:
    """Return the sparse weight, (out_features, in_features) float32.

    Args:
        weight: (out_features, in_features) float32; not changed.
        factor: the factorized Hessian of its input, its columns in their own order.
        sparsity: share of every 128 columns' weights that go.
        pattern: n:m, None for no pattern.
    """
    ordered = weight.T.index_select(0, factor.order)
    residual = ordered.clone()
    for stop in range(len(ordered), 0, -_COLUMNS):
        batch = slice(max(0, stop - _COLUMNS), stop)
        target = torch.addmm(residual[batch], factor.feedback[stop:, batch].T, residual[stop:])
        pivots, feedback = factor.pivots[batch].unsqueeze(1), factor.feedback[batch, batch]
        keep = torch.ones_like(target, dtype=torch.bool)
        if pattern is None:
            cost = (_untouched(residual[batch], target, feedback) * pivots).square_()
            keep = _highest(cost.reshape(1, -1), sparsity).view_as(target)
        _sweep(residual[batch], target, pivots, feedback, keep=keep, pattern=pattern)
    made = torch.empty_like(ordered)
    made[factor.order] = ordered.sub_(residual)
    return made.T.contiguous()


def _sweep(
    residual: Tensor, target: Tensor, pivots: Tensor, feedback: Tensor, *, keep: Tensor, pattern: Pattern | None
) -> None:
    """Go through columns from the last to the first; `residual` becomes the weight minus what is left of it.

    Args:
        residual: (columns, out_features), the weight.
        target: (columns, out_features), the weight and the feedback of columns outside.
        pivots: (columns, 1).
        feedback: (columns, columns), lower triangular with ones on its diagonal.
        keep: (columns, out_features) bool; with a pattern it is chosen here.
        pattern: n:m.
    """
    weights = feedback.T.contiguous()
    for index in reversed(range(len(residual))):
        done = residual[index + 1 :]
        if pattern is not None and (len(residual) - 1 - index) % pattern.group == 0:
            group = slice(index + 1 - pattern.group, index + 1)
            fed = torch.addmm(target[group], weights[group, index + 1 :], done)
            current = _untouched(residual[group], fed, feedback[group, group])
            keep[group] = _highest_count((current * pivots[group]).square_().T, pattern.kept).T
        left = torch.addmv(target[index], done.T, weights[index, index + 1 :])
        residual[index] -= left * keep[index]


def _untouched(weight: Tensor, fed: Tensor, feedback: Tensor) -> Tensor:
    """Return what columns become when all of them stay, (columns, out_features).

    Each takes up errors made before, and those after it in turn what it took up.

    Args:
        weight: (columns, out_features).
        fed: the weight with the feedback of the columns before all of these.
        feedback: (columns, columns), lower triangular with ones on its diagonal.
    """
    return weight + torch.linalg.solve_triangular(feedback.T, fed - weight, upper=True, unitriangular=True)


def holds(weight: Tensor, pattern: Pattern) -> bool:
    """Return whether every group of a weight, (out_features, in_features), has no more than the pattern allows."""
    return most_in_group(weight, pattern) <= pattern.kept


def most_in_group(weight: Tensor, pattern: Pattern) -> int:
    """Return the largest number of weights that are not zero in any group of the pattern's length."""
    return int((weight != 0).reshape(len(weight), -1, pattern.group).sum(-1).max())


def _highest(scores: Tensor, sparsity: float) -> Tensor:
    """Return which scores of each row stay when a share of them goes; exactly that many."""
    return _highest_count(scores, scores.shape[1] - round(sparsity * scores.shape[1]))


def _highest_count(scores: Tensor, count: int) -> Tensor:
    keep = torch.zeros_like(scores, dtype=torch.bool)
    return keep.scatter_(1, scores.topk(count, dim=1, sorted=False).indices, True)


def _grouped_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    groups = scores.reshape(-1, pattern.group)
    return _highest_count(groups, pattern.kept).view_as(scores)
