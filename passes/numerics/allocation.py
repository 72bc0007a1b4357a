"""Choosing one of several sizes for every part of a model, so that the whole fits a budget and loses least.

A multiple-choice knapsack, solved exactly as an integer programme (HiGHS, by way of scipy's `milp`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

_GAP = 1e-6
_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a part: its bits, its bytes, and what the model loses by it."""

    bits: int
    size: float
    loss: float


def allocate(parts: Sequence[Sequence[Option]], budget: float) -> list[Option] | None:
    """Return the option of each part with which the losses add up to the least.

    Args:
        parts: the options of each part, at least one.
        budget: what the sizes may add up to.

    Returns:
        None when even the smallest options are too large.
    """
    options = [option for part in parts for option in part]
    if not options:
        return []
    sizes = np.array([option.size for option in options])
    losses = np.array([option.loss for option in options])
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    one_each = csr_array((np.ones(len(options)), (owner, np.arange(len(options)))))
    solved = milp(
        losses / max(float(losses.max()), np.finfo(float).tiny),
        constraints=[
            LinearConstraint(one_each, 1, 1),  # pyright: ignore[reportArgumentType]
            LinearConstraint((sizes / budget)[None], -np.inf, 1),
        ],
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
    )
    if solved.x is None:
        return None
    return [option for option, chosen in zip(options, solved.x, strict=True) if chosen > 0.5]
