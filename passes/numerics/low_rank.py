"""A matrix of a given rank that is as near as possible to another, also where inputs are not all alike.

Without weights that is the truncated singular value decomposition (Eckart and Young, 1936, "The approximation of one
matrix by another of lower rank"). For a layer that multiplies inputs x the error that counts is that of the product:
the mean of |E x|² is the trace of E H Eᵀ, where H is the mean of x xᵀ. Liu et al. (2024, "EoRA: Fine-tuning-free
Compensation for Compressed LLM with Eigenspace Low-Rank Approximation") multiply by a root of H, truncate, and divide
again. The division cancels: with U the leading eigenvectors of E H Eᵀ the nearest matrix is U Uᵀ E, so that H need not
have an inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS = 512
"""Columns that are worked on at a time in float64."""


def factors(matrix: Tensor, rank: int, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return two factors whose product is the nearest to a matrix; each takes the same share of its length.

    Args:
        matrix: (out_features, in_features) float32.
        rank: of the product, at most; what a smaller matrix does not need stays zero.
        moments: (in_features, in_features), the mean of x xᵀ over inputs; None where all inputs count alike.

    Returns:
        (out_features, rank) and (rank, in_features) float32.
    """
    basis, square = torch.linalg.qr(matrix) if matrix.shape[0] > matrix.shape[1] else (None, matrix)
    kept = min(rank, len(square))
    left = torch.linalg.eigh(_energy(square, moments)).eigenvectors[:, -kept:].flip(1).float()
    left = left if basis is None else basis @ left
    right = left.T @ matrix
    roots = right.norm(dim=1).sqrt()
    up, down = torch.zeros(matrix.shape[0], rank), torch.zeros(rank, matrix.shape[1])
    up[:, :kept] = left * roots
    down[:kept] = right / roots.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    return up, down


def length(matrix: Tensor, moments: Tensor | None = None) -> float:
    """Return the root mean square of what a matrix makes of its inputs; its norm where all count alike."""
    if moments is None:
        return float(matrix.norm())
    return max(0.0, float(((matrix @ moments) * matrix).sum(dtype=torch.float64))) ** 0.5


def _energy(matrix: Tensor, moments: Tensor | None) -> Tensor:
    """Return E H Eᵀ in float64: the largest inputs are often a thousand times the others, and squares double that."""
    wide = matrix.double()
    if moments is None:
        return wide @ wide.T
    energy = torch.zeros(len(matrix), len(matrix), dtype=torch.float64)
    for columns, rows in zip(wide.split(_COLUMNS, dim=1), moments.split(_COLUMNS), strict=True):
        energy.addmm_(columns, rows.double() @ wide.T)
    return energy
