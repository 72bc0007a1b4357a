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
    ordered = hessian.index_select(0, order).index_select(1, order)
    diagonal = ordered.diagonal().clone()
    mean = float(diagonal.mean())
    for double in (False, True):
        matrix = ordered.double() if double else ordered
        for step in range(_DAMPING_STEPS + 1):
            share = damping * 10**step if damping else 10.0 ** (step - _DAMPING_STEPS - 1) * (step > 0)
            upper = _inverse_factor(matrix, diagonal.to(matrix.dtype) + share * mean)
            if upper is not None:
                hessian.diagonal().add_(share * mean)
                return Factor(hessian, upper.float(), order, energy, share, int(dead.sum()), double)
    return None


def _inverse_factor(matrix: Tensor, diagonal: Tensor) -> Tensor | None:
    """Return the upper Cholesky factor of the inverse of `matrix` with another diagonal; None if it has none.

    Works with one matrix beside the given one: a Hessian of a wide layer is the largest thing in memory.
    """
    matrix.diagonal().copy_(diagonal)
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info) or not bool(torch.isfinite(lower).all()):
        return None
    inverse = torch.cholesky_inverse(lower, out=lower)
    upper, info = torch.linalg.cholesky_ex(inverse, upper=True, out=(inverse, info))
    return None if int(info) or not bool(torch.isfinite(upper).all()) else upper


def gptq(
    weight: Tensor, factor: Factor, grid: Grid, dtype: torch.dtype, *, clip: bool = False, refits: int = 0
) -> tuple[QuantizedWeight, Tensor]:
    """Quantize a weight.

    Args:
        weight: (out_features, in_features) float32; not changed. Several layers of one product may be stacked by rows.
        factor: the factorized Hessian of its input.
        grid: bits, group size, symmetry.
        dtype: the dtype scales will be stored in.
        clip: search the range of each group by squared error, columns weighted by their energy.
        refits: how often to fit the scales to the codes and round again; each row keeps its best round.

    Returns:
        The quantized weight, and each row's mean squared error over calibration tokens (damping included),
        (out_features,).
    """
    scales = fit_scales(weight, grid, dtype, clip=clip, importance=factor.energy if clip else None)
    codes, errors = _sweep(weight, factor, scales)
    for _ in range(refits):
        refitted = _refit(weight, codes, scales, factor.hessian)
        tried, tried_errors = _sweep(weight, factor, refitted)
        # One scale for the whole tensor: the rows stand or fall together.
        better = tried_errors < errors if grid.group_size != "tensor" else tried_errors.sum() < errors.sum()
        better = better.expand_as(errors)
        codes[better] = tried[better]
        errors = torch.where(better, tried_errors, errors)
        scales = Scales(torch.where(better[: len(scales.scale), None], refitted.scale, scales.scale), scales.zero, grid)
    return scales.weight(codes), errors


def _refit(weight: Tensor, codes: Tensor, scales: Scales, hessian: Tensor) -> Scales:
    """Return the scales that fit `codes` best, group after group, each with the others as they are by then.

    With c the centred codes of a row's group and R the row's residual, the best step of its scale is
    (R H_g · c) / (c H_gg c). A step that would halve or double a scale is not taken: the codes tell nothing then.

    Args:
        weight: (out_features, in_features) float32.
        codes: its codes, uint8.
        scales: what they were rounded with.
        hessian: (in_features, in_features), damped.
    """
    centred = codes.float().sub_(scales.columns(codes.shape[1])[1])
    fitted = scales.scale.float().clone()
    width = codes.shape[1] // fitted.shape[1]
    residual = weight - scales.weight(codes).dequantize(torch.float32)
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


def _sweep(weight: Tensor, factor: Factor, scales: Scales) -> tuple[Tensor, Tensor]:
    """Round the columns of a weight in GPTQ's order.

    With E the scaled errors of the columns and U the factor, weight - rounded = E U, so that the error of the product,
    (E U) H (E U)^T, is E E^T: it costs nothing to know.

    Returns:
        Codes (out_features, in_features) uint8 in the weight's own order, and the error of each row.
    """
    out_features, in_features = weight.shape
    width, top = in_features // scales.scale.shape[1], scales.grid.levels - 1
    # Transposed, a column is contiguous: worth a factor of two.
    work = weight.T.index_select(0, factor.order)
    scale = scales.scale.float().T.expand(-1, out_features).contiguous()
    zero = scales.zero.T.expand(-1, out_features).contiguous()
    codes = torch.empty(in_features, out_features, dtype=torch.uint8)
    total = torch.zeros(out_features)
    places = factor.order.tolist()
    for start in range(0, in_features, _COLUMNS):
        stop = min(start + _COLUMNS, in_features)
        errors = torch.empty(stop - start, out_features)
        block, local = work[start:stop], factor.upper[start:stop, start:stop]
        for index in range(stop - start):
            place = places[start + index]
            group = place // width
            code = (block[index] / scale[group]).round_().add_(zero[group]).clamp_(0, top)
            codes[place] = code.to(torch.uint8)
            error = torch.sub(block[index], code.sub_(zero[group]).mul_(scale[group]), out=errors[index])
            error.div_(local[index, index])
            block[index + 1 :].addr_(local[index, index + 1 :], error, alpha=-1)
        work[stop:].addmm_(factor.upper[start:stop, stop:].T, errors, alpha=-1)
        total += errors.square().sum(0)
    return codes.T.contiguous(), total
