"""A matrix of a given rank that is as near as possible to another.

The truncated singular value decomposition (Eckart and Young, 1936, "The approximation of one matrix by another of lower
rank"). The singular values are shared between both factors, so that neither is much larger than the other.
"""

from __future__ import annotations

import torch
from torch import Tensor


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return two factors of a matrix, and what they leave out.

    Args:
        matrix: (out_features, in_features) float32, not all zero.
        rank: of the product, at most; what a smaller matrix does not need stays zero.

    Returns:
        (out_features, rank), (rank, in_features), and the norm of what is left out over that of the matrix.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = min(rank, len(values))
    roots = values[:kept].sqrt()
    up, down = torch.zeros(matrix.shape[0], rank), torch.zeros(rank, matrix.shape[1])
    up[:, :kept], down[:kept] = left[:, :kept] * roots, roots.unsqueeze(1) * right[:kept]
    return up, down, float((matrix - up @ down).norm() / matrix.norm())
