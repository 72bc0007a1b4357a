"""What rounding of earlier layers has done to a layer's input, made up for in the layer's own weight.

Li, Yin, Lee, Xiao and Panda (2025), "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration": a layer
should give what it gave before anything was rounded. With x its input then, x' its input now and H = mean x' x'ᵀ, the
weight that comes nearest to that is W + W mean((x - x') x'ᵀ) H⁻¹, by least squares; any other weight is further away
by its distance from this one, measured with the same H. So GPTQ may round it as it rounds W. GPTAQ works the move into
the steps of GPTQ, column by column; here it is made once, before them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .hessian import Factor


class Drift:
    """The mean of (x - x') x'ᵀ over calibration tokens, (in_features, in_features) float32."""

    def __init__(self, in_features: int) -> None:
        self.matrix = torch.zeros(in_features, in_features)
        self._tokens = 0

    def add(self, rows: Tensor, exact: Tensor) -> None:
        """Add inputs as they are and as they were before anything was rounded, each (tokens, in_features) float32."""
        total = self._tokens + len(rows)
        if len(rows):
            self.matrix.addmm_((exact - rows).T, rows, beta=self._tokens / total, alpha=1 / total)
        self._tokens = total


def corrected(weight: Tensor, drift: Drift, factor: Factor, share: float) -> Tensor:
    """Return the weight whose product with the inputs as they are comes nearest to what the weight gave before.

    Args:
        weight: (out_features, in_features) float32.
        drift: of its input.
        factor: the factorized Hessian of its input, whose damping keeps the move small.
        share: of the way to go, from 0 to 1.
    """
    # H = F diag(pivots²) Fᵀ in the order of the factor.
    wanted = (weight @ drift.matrix).index_select(1, factor.order).T
    moved = torch.linalg.solve_triangular(factor.feedback, wanted, upper=False, unitriangular=True)
    moved /= factor.pivots.square()[:, None]
    moved = torch.linalg.solve_triangular(factor.feedback.T, moved, upper=True, unitriangular=True)
    return weight.index_add(1, factor.order, moved.T, alpha=share)
