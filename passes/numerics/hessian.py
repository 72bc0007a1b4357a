"""The Hessian of a layer's squared error, gathered over calibration tokens and factorized."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_COLUMNS = 512
"""Columns that are worked on at a time."""

_DAMPING_STEPS = 5
"""How often damping is raised tenfold before the factorization is tried in float64."""


class Hessian:
    """The mean of x xᵀ over calibration tokens, float32, of one product's input."""

    def __init__(self, in_features: int) -> None:
        self._lower = torch.zeros(in_features, in_features)
        self.tokens = 0

    def add(self, rows: Tensor) -> None:
        """Add inputs, (tokens, in_features) float32; only the lower triangle is computed."""
        if not rows.shape[0]:
            return
        total = self.tokens + rows.shape[0]
        for start in range(0, rows.shape[1], _COLUMNS):
            stop = start + _COLUMNS
            self._lower[start:, start:stop].addmm_(
                rows[:, start:].T, rows[:, start:stop], beta=self.tokens / total, alpha=1 / total
            )
        self.tokens = total

    @property
    def matrix(self) -> Tensor:
        """The whole matrix, (in_features, in_features); the accumulator itself, not a copy."""
        for start in range(0, len(self._lower), _COLUMNS):
            stop = start + _COLUMNS
            self._lower[start:stop, stop:] = self._lower[stop:, start:stop].T
        return self._lower


@dataclass(frozen=True, slots=True)
class Factor:
    """What GPTQ needs of a Hessian H.

    With H in the order of `order` = L Lᵀ, L = F diag(pivots).

    Attributes:
        hessian: the damped Hessian, (in_features, in_features), in the weight's own order.
        feedback: F, lower triangular with ones on its diagonal, in the order of `order`.
        pivots: (in_features,), in the order of `order`.
        order: the columns; the last is rounded first.
        energy: diagonal of the Hessian in the weight's own order.
        damping: the share of the mean diagonal that was added.
        dead: number of columns whose input is always zero.
        double: whether float64 was needed.
    """

    hessian: Tensor
    feedback: Tensor
    pivots: Tensor
    order: Tensor
    energy: Tensor
    damping: float
    dead: int
    double: bool


def factorize(hessian: Tensor, *, damping: float, act_order: bool) -> Factor | None:
    """Factorize a Hessian, raising the damping until Cholesky succeeds.

    Args:
        hessian: (in_features, in_features) float32; overwritten.
        damping: share of the mean diagonal to add at first.
        act_order: take columns by falling energy rather than from left to right.

    Returns:
        None when no input was ever non-zero, or when even float64 with the highest damping fails.
    """
    energy = hessian.diagonal().clone()
    dead = energy <= 0
    if bool(dead.all()):
        return None
    hessian.diagonal()[dead] = energy[~dead].mean()
    order = torch.argsort(energy, descending=True, stable=True) if act_order else torch.arange(energy.numel())
    order = order.flip(0)
    diagonal = hessian.diagonal().clone()
    mean = float(diagonal.mean())
    for double in (False, True):
        for step in range(_DAMPING_STEPS + 1):
            share = damping * 10**step if damping else 10.0 ** (step - _DAMPING_STEPS - 1) * (step > 0)
            hessian.diagonal().copy_(diagonal + share * mean)
            lower = _cholesky(hessian, order, double=double)
            if lower is not None:
                pivots = lower.diagonal().clone()
                return Factor(hessian, lower.div_(pivots), pivots, order, energy, share, int(dead.sum()), double)
    return None


def _cholesky(hessian: Tensor, order: Tensor, *, double: bool) -> Tensor | None:
    """Return the lower Cholesky factor of a reordered Hessian; None if it has none.

    Works with one matrix beside the given one: the Hessian of a wide layer is the largest thing in memory.
    """
    ordered = hessian.index_select(0, order)
    for part in ordered.split(_COLUMNS):
        part.copy_(part.index_select(1, order))
    # Seen by columns, as LAPACK wants it, a symmetric matrix is itself: it is factorized in place.
    matrix = (ordered.double() if double else ordered).mT
    lower, info = torch.linalg.cholesky_ex(matrix, out=(matrix, torch.empty((), dtype=torch.int32)))
    if int(info) or not bool(torch.isfinite(lower.diagonal()).all()) or not bool(torch.isfinite(lower.sum())):
        return None
    return lower.float()
