"""GPTQ: rounding weights one column after another, each error spread over the columns still to come.

Frantar, Ashkboos, Hoefler and Alistarh (2023), "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers". Columns are taken in the order of their activations' energy (act-order), but groups keep the places they
have in the weight ("static groups"), so that the artifact needs no reordering.

The grid is chosen before a code is known, so it fits the weights and not the product. When the codes are known, the
scales that minimize the error of the product are a least-squares problem; it is solved by coordinate descent over the
groups, and the columns are rounded again on the better grid ("refit"). At 2 and 3 bits this matters more than the
choice of GPTQ's other parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.quantized import Grid, QuantizedWeight
from .grid import Scales, fit_scales

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
        hessian: the damped Hessian, (in_features, in_features), in the weight's own order.
        upper: the upper Cholesky factor of the inverse, in the order of `order`, (in_features, in_features).
        order: the columns by falling energy.
        energy: diagonal of the Hessian in the weight's own order.
        damping: the share of the mean diagonal that was added.
        dead: number of columns whose input is always zero.
        double: whether float64 was needed.
    """

    hessian: Tensor
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
                hessian.diagonal().add_(share * mean)
                return Factor(hessian, upper.float(), order, energy, share, int(dead.sum()), double)
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
    weight: Tensor, factor: Factor, grid: Grid, dtype: torch.dtype, *, clip: bool = False, refits: int = 0
) -> tuple[QuantizedWeight, float]:
    """Quantize a weight.

    Args:
        weight: (out_features, in_features) float32; not changed. Several layers of one product may be stacked by rows.
        factor: the factorized Hessian of its input.
        grid: bits, group size, symmetry.
        dtype: the dtype scales will be stored in.
        clip: search the range of each group by squared error, columns weighted by their energy.
        refits: how often to fit the scales to the codes and round again.

    Returns:
        The quantized weight, and the mean squared error of the product over calibration tokens, summed over outputs
        (damping included): the best of all rounds.
    """
    scales = fit_scales(weight, grid, dtype, clip=clip, importance=factor.energy if clip else None)
    best: tuple[Tensor, Scales, float] | None = None
    for index in range(refits + 1):
        codes = _round_columns(weight, factor, scales)
        residual = weight - _dequantized(codes, scales)
        error = float(((residual @ factor.hessian) * residual).sum())
        if best is None or error < best[2]:
            best = (codes, scales, error)
        if index < refits:
            scales = _refit(codes, scales, residual, factor.hessian)
    assert best is not None
    return best[1].weight(best[0]), best[2]


def _dequantized(codes: Tensor, scales: Scales) -> Tensor:
    scale, zero = scales.columns(codes.shape[1])
    return (codes.float() - zero) * scale


def _refit(codes: Tensor, scales: Scales, residual: Tensor, hessian: Tensor) -> Scales:
    """Return the scales that fit `codes` best, group after group, each with the others as they are by then.

    With c the centred codes of a row's group and R the row's residual, the best step of its scale is
    (R H_g · c) / (c H_gg c). A step that would halve or double a scale is not taken: the codes tell nothing then.

    Args:
        codes: (out_features, in_features) uint8.
        scales: what they were rounded with.
        residual: weight - dequantized, (out_features, in_features); overwritten.
        hessian: (in_features, in_features), damped.
    """
    centred = codes.float() - scales.columns(codes.shape[1])[1]
    fitted = scales.scale.float().clone()
    width = codes.shape[1] // fitted.shape[1]
    for group in range(fitted.shape[1]):
        columns = slice(group * width, (group + 1) * width)
        part = centred[:, columns]
        gain = ((residual @ hessian[:, columns]) * part).sum(1, keepdim=True)
        curvature = ((part @ hessian[columns, columns]) * part).sum(1, keepdim=True)
        if fitted.shape[0] == 1:
            gain, curvature = gain.sum(0, keepdim=True), curvature.sum(0, keepdim=True)
        step = torch.where(curvature > 0, gain / curvature, 0)
        old = fitted[:, group : group + 1]
        step = torch.where(step.abs() < old / 2, step, 0)
        new = (old + step).to(scales.scale.dtype).float()
        residual[:, columns] -= part * (new - old)
        fitted[:, group : group + 1] = new
    return Scales(fitted.to(scales.scale.dtype), scales.zero, scales.grid)


def _round_columns(weight: Tensor, factor: Factor, scales: Scales) -> Tensor:
    """Round all columns in GPTQ's order; returns the codes in the weight's own order, uint8."""
    scale, zero = scales.columns(weight.shape[1])
    order = factor.order
    work, scale, zero = weight[:, order], scale[:, order].expand_as(weight), zero[:, order].expand_as(weight)
    codes = _sweep(work, factor.upper, scale, zero, scales.grid.levels - 1)
    unordered = torch.empty_like(codes)
    unordered[:, order] = codes
    return unordered


def _sweep(work: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Round the columns of `work` (overwritten) from left to right; all arguments are in GPTQ's order."""
    columns = work.shape[1]
    codes = torch.empty(work.shape, dtype=torch.uint8)
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
    return codes_t.T.contiguous()
