"""Which units of a layer's input matter, and fitting the weights that read the ones that are left.

Importance follows Muralidharan et al. (2024), "Compact Language Models via Pruning and Knowledge Distillation"
(Minitron): activations over calibration data. Fitting is ordinary least squares on the layer's output, as in Hubara et
al. (2021), "Accelerated Sparse Neural Training", and SliceGPT's kin, drawn towards the weights that were.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DAMPING = 0.01
"""Weight of the old weights, as a share of the mean energy of the inputs."""


class Energy:
    """The mean square of each channel of a layer's input over tokens."""

    def __init__(self, channels: int) -> None:
        self._total = torch.zeros(channels, dtype=torch.float64)
        self.tokens = 0

    def add(self, rows: Tensor) -> None:
        """Add inputs, (tokens, channels)."""
        self._total += rows.float().square().sum(0)
        self.tokens += len(rows)

    @property
    def mean(self) -> Tensor:
        """(channels,) float32; zeros before any token."""
        return (self._total / max(1, self.tokens)).float()


def columns_of_units(units: Tensor, parts: tuple[int, ...], total: int) -> Tensor:
    """Return the columns of some units, rising within each part.

    Args:
        units: their numbers.
        parts: columns of a unit in each part; parts lie one after another, and in each of them the units.
        total: units in all.
    """
    found: list[Tensor] = []
    start = 0
    for width in parts:
        found.append((start + units.unsqueeze(1) * width + torch.arange(width)).reshape(-1))
        start += total * width
    return torch.cat(found)


def scores_of_units(columns: Tensor, parts: tuple[int, ...], total: int) -> Tensor:
    """Return the sum of the scores of each unit's columns, (total,); see `columns_of_units`."""
    pieces = columns.split([total * width for width in parts])
    return torch.stack([piece.reshape(total, width).sum(1) for piece, width in zip(pieces, parts, strict=True)]).sum(0)


def refit(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """Return the weight that comes nearest to the layer's output when it reads some columns alone.

    It minimizes tr((W' - W) H (W' - W)ᵀ) + d |W' - W|² over the kept columns of W', the others being zero; d is a share
    of the mean diagonal of H, so that what was never active stays as it was.

    Args:
        weight: W, (out_features, in_features) float32.
        hessian: H, the mean of x xᵀ, (in_features, in_features) float32.
        kept: columns, (n,).
    """
    inside = hessian.index_select(0, kept)
    damping = _DAMPING * float(hessian.diagonal().mean())
    made = torch.zeros_like(weight)
    made[:, kept] = weight[:, kept]
    if not damping:
        return made
    # What the lost columns added is put on the kept ones: (W_lost H_lost,kept) (H_kept,kept + d)^-1.
    lost = weight.clone()
    lost[:, kept] = 0
    square = inside[:, kept].double()
    square.diagonal().add_(damping)
    moved = torch.cholesky_solve((lost @ inside.T).T.double(), torch.linalg.cholesky(square)).T
    made[:, kept] += moved.float()
    return made
