"""GPTQ: rounding weights one column after another, each error spread over the columns still to come.

Frantar, Ashkboos, Hoefler and Alistarh (2023), "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers". Columns are taken in the order of their activations' energy (act-order), but groups keep the places they
have in the weight ("static groups"), so that the artifact needs no reordering.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.quantized import Grid, QuantizedWeight
from .grid import fit_scales

_COLUMNS = 128
_DAMPING_STEPS = 5
"""How often damping is raised tenfold before the factorization is tried in float64."""


class Hessian:
    """The mean of x xᵀ over calibration tokens, float32, of one product's input."""

    def __init__(self, in_features: int) -> None:
        self.matrix = torch.zeros(in_features, in_features)
        self.tokens = 0

    def add(self, rows: Tensor) -> None:
        """Add inputs, (tokens, in_features) float32."""
        if not rows.shape[0]:
            return
        total = self.tokens + rows.shape[0]
        self.matrix.mul_(self.tokens / total)
        self.matrix.addmm_(rows.T, rows, alpha=1 / total)
        self.tokens = total


@dataclass(frozen=True, slots=True)
class Factor:
    """What GPTQ needs of a Hessian.

    Attributes:
        upper: the upper Cholesky factor of the inverse, in the order of `order`, (in_features, in_features).
        order: the columns by falling energy.
        energy: diagonal of the Hessian in the weight's own order.
        damping: the share of the mean diagonal that was added.
        dead: number of columns whose input is always zero.
        double: whether float64 was needed.
    """

    upper: Tensor
    order: Tensor
    energy: Tensor
    damping: float
    dead: int
    double: bool


def factorize(hessian: Tensor, *, damping: float, act_order: bool) -> Factor | None:
    """Invert and factorize a Hessian, raising the damping until Cholesky succeeds.

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
    ordered = hessian[order][:, order]
    mean = float(ordered.diagonal().mean())
    for double in (False, True):
        matrix = ordered.double() if double else ordered
        for step in range(_DAMPING_STEPS + 1):
            share = damping * 10**step if damping else 10.0 ** (step - _DAMPING_STEPS - 1) * (step > 0)
            upper = _inverse_factor(matrix, share * mean)
            if upper is not None:
                return Factor(upper.float(), order, energy, share, int(dead.sum()), double)
    return None


def _inverse_factor(matrix: Tensor, added: float) -> Tensor | None:
    damped = matrix.clone()
    damped.diagonal().add_(added)
    lower, info = torch.linalg.cholesky_ex(damped)
    if int(info) or not bool(torch.isfinite(lower).all()):
        return None
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(info) or not bool(torch.isfinite(upper).all()) else upper


def gptq(
    weight: Tensor, factor: Factor, grid: Grid, dtype: torch.dtype, *, clip: bool = True
) -> tuple[QuantizedWeight, float]:
    """Quantize a weight.

    Args:
        weight: (out_features, in_features) float32; not changed. Several layers of one product may be stacked by rows.
        factor: the factorized Hessian of its input.
        grid: bits, group size, symmetry.
        dtype: the dtype scales will be stored in.
        clip: search the range of each group by squared error, columns weighted by their energy.

    Returns:
        The quantized weight, and the error of the product it was solved for (a sum of squares, damping included).
    """
    scales = fit_scales(weight, grid, dtype, clip=clip, importance=factor.energy if clip else None)
    scale, zero = scales.columns(weight.shape[1])
    order = factor.order
    work, scale, zero = weight[:, order], scale[:, order].expand_as(weight), zero[:, order].expand_as(weight)
    codes, error = _sweep(work, factor.upper, scale, zero, grid.levels - 1)
    unordered = torch.empty_like(codes)
    unordered[:, order] = codes
    return scales.weight(unordered), error


def _sweep(work: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, top: int) -> tuple[Tensor, float]:
    """Round the columns of `work` (overwritten) from left to right; all arguments are in GPTQ's order."""
    columns = work.shape[1]
    codes = torch.empty(work.shape, dtype=torch.uint8)
    total = 0.0
    # Columns are worked on transposed: a column is then contiguous, which is worth a factor of two.
    work, scale, zero, codes_t = work.T.contiguous(), scale.T.contiguous(), zero.T.contiguous(), codes.T.contiguous()
    for start in range(0, columns, _COLUMNS):
        stop = min(start + _COLUMNS, columns)
        errors = torch.empty(stop - start, work.shape[1])
        block = work[start:stop]
        local = upper[start:stop, start:stop]
        for index in range(stop - start):
            at = start + index
            code = (block[index] / scale[at]).round_().add_(zero[at]).clamp_(0, top)
            codes_t[at] = code.to(torch.uint8)
            error = block[index].sub(code.sub_(zero[at]).mul_(scale[at])).div_(local[index, index])
            errors[index] = error
            block[index + 1 :].addr_(local[index, index + 1 :], error, alpha=-1)
        work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        total += float(errors.square().sum())
    return codes_t.T.contiguous(), total
