"""GPTQ: rounding weights one column after another, each error made up for in the columns still to come.

Frantar, Ashkboos, Hoefler and Alistarh (2023), "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", in the form of Chee, Cai, Kuleshov and De Sa (2023), "QuIP: 2-Bit Quantization of Large Language Models
With Guarantees", who show that it is the same as linear feedback of the errors made so far through the Cholesky factor
of the Hessian itself: no inverse is needed. Columns are taken in the order of their activations' energy (act-order),
but groups keep the places they have in the weight ("static groups"), so that the artifact needs no reordering.

A grid chosen from the weights alone fits the weights and not the product. So scales are fitted by least squares on the
error of the product, twice: before the rounding to the codes that each group gets by itself, with its own diagonal
block of the Hessian ("prefit", cheap), and after it to the codes themselves, group after group with the whole Hessian
("refit", about two more sweeps). At 2 and 3 bits this matters more than the choice of GPTQ's other parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.quantized import Grid, Number, QuantizedWeight
from .grid import Scales, fit_scales, nearest_number
from .hessian import Factor

_COLUMNS = 128
"""Columns that are rounded before their errors are fed to the others by one matrix product."""

_ROWS = 2048
"""Rows of a weight that are worked on at a time: a batch of their columns stays in the processor's cache."""


def gptq(
    weight: Tensor,
    factor: Factor,
    grid: Grid,
    dtype: torch.dtype,
    *,
    clip: bool = False,
    prefits: int = 0,
    refits: int = 0,
    largest: float | None = None,
    mask: Tensor | None = None,
) -> tuple[QuantizedWeight, Tensor]:
    """Quantize a weight.

    Args:
        weight: (out_features, in_features) float32; not changed. Several layers of one product may be stacked by rows.
        factor: the factorized Hessian of its input.
        grid: bits, group size, symmetry.
        dtype: the dtype scales will be stored in.
        clip: search the range of each group by squared error, columns weighted by their energy.
        prefits: how often to fit the scales before the rounding. Those of floating-point grids, which are themselves
            small numbers, are never fitted.
        refits: how often to fit the scales after it; before each further time the columns are rounded again, and each
            row keeps its best round.
        largest: the largest magnitude among the weights that share nvfp4's divisor; of this weight when None.
        mask: (out_features, in_features) bool, False where the weight is zero and stays so; None for no such weights.

    Returns:
        The quantized weight, and each row's mean squared error over calibration tokens (damping included),
        (out_features,).
    """
    rows = weight.shape[0] if grid.group_size == "tensor" else _ROWS
    if grid.number == "nvfp4" and largest is None:
        largest = float(weight.abs().max())
    importance = factor.energy if clip else None
    if grid.number != "int":
        prefits = refits = 0
    parts = [
        _quantize(
            part,
            factor,
            fit_scales(part, grid, dtype, clip=clip, importance=importance, largest=largest),
            prefits,
            refits,
            mask=allowed,
        )
        for part, allowed in zip(weight.split(rows), _masks(mask, weight, rows), strict=True)
    ]
    codes, scales, errors = zip(*parts, strict=True)
    scale, zero = torch.cat([one.scale for one in scales]), torch.cat([one.zero for one in scales])
    joined = Scales(scale, zero, grid, scales[0].divisor)
    return joined.weight(torch.cat(codes)), torch.cat(errors)


def _masks(mask: Tensor | None, weight: Tensor, rows: int) -> Sequence[Tensor | None]:
    return [None] * len(weight.split(rows)) if mask is None else mask.split(rows)


def _quantize(
    weight: Tensor, factor: Factor, scales: Scales, prefits: int, refits: int, *, mask: Tensor | None
) -> tuple[Tensor, Scales, Tensor]:
    """Return levels, scales and the error of each row of a part of a weight."""
    scales = _prefit(weight, factor, scales, prefits, mask)
    codes, errors = _sweep(weight, factor, scales, mask)
    for round_ in range(refits):
        if round_:
            tried, tried_errors = _sweep(weight, factor, scales, mask)
            # One scale for the whole tensor: the rows stand or fall together.
            alone = scales.grid.group_size != "tensor"
            better = tried_errors < errors if alone else (tried_errors.sum() < errors.sum()).expand_as(errors)
            codes[better] = tried[better]
            errors = torch.where(better, tried_errors, errors)
        scales, won = _refit(weight, codes, scales, factor.hessian)
        errors -= won
    return codes, scales, errors


def _prefit(weight: Tensor, factor: Factor, scales: Scales, rounds: int, mask: Tensor | None) -> Scales:
    """Return the scales that fit the codes which each group gets by itself.

    Every group is rounded as if there were no others, in batches of at most `_COLUMNS` columns, and its scale is the
    least-squares fit (c H w) / (c H c) over the diagonal blocks H of these batches, c being its centred codes. A fit
    below half or above one and a half of the scale before is not taken: the codes tell nothing then.

    Args:
        weight: (out_features, in_features) float32.
        factor: the factorized Hessian.
        scales: to begin with.
        rounds: how often to round and fit.
        mask: as in `gptq`.
    """
    groups = scales.scale.shape[1]
    if not rounds:
        return scales
    width = weight.shape[1] // groups
    columns = next(size for size in range(min(width, _COLUMNS), 0, -1) if width % size == 0)
    fitted = scales.scale.clone()
    for group, batches in enumerate(_batches(factor.order, columns).view(groups, -1, columns)):
        parts = [
            (weight.T[batch], hessian, _unit_factor(hessian), None if mask is None else mask.T[batch])
            for batch in batches
            for hessian in [factor.hessian[batch][:, batch]]
        ]
        zero = scales.zero[:, group]
        low, high = -zero, scales.grid.levels - 1 - zero
        for _ in range(rounds):
            scale = fitted[:, group].float()
            gain = curvature = torch.zeros(1)
            for part, hessian, feedback, allowed in parts:
                same = [(scale, low, high)] * columns
                centred = _round_columns(part.clone(), part.clone(), feedback, same, mask=allowed)
                product = hessian @ centred
                gain = gain + (product * part).sum(0)
                curvature = curvature + product.mul_(centred).sum(0)
            if len(scale) == 1:
                gain, curvature = gain.sum(0, keepdim=True), curvature.sum(0, keepdim=True)
            new = gain / curvature
            fitted[:, group] = torch.where((new - scale).abs() < scale / 2, new, scale)  # NaN is not taken either
    return Scales(fitted, scales.zero, scales.grid)


def _batches(order: Tensor, columns: int) -> Tensor:
    """Return the columns in batches of neighbours, (batches, columns), each in the order of `order`."""
    neighbours = torch.arange(order.numel()).view(-1, columns)
    return neighbours.gather(1, torch.argsort(order).view(-1, columns).argsort(1))


def _unit_factor(hessian: Tensor) -> Tensor:
    """Return the lower Cholesky factor with its columns divided by its diagonal."""
    lower, _ = torch.linalg.cholesky_ex(hessian)
    return lower / lower.diagonal()


def _refit(weight: Tensor, codes: Tensor, scales: Scales, hessian: Tensor) -> tuple[Scales, Tensor]:
    """Return the scales that fit `codes` best, group after group, each with the others as they are by then.

    With c the centred codes of a row's group and R the row's residual, the best step of its scale is
    (R H_g · c) / (c H_gg c). A step that would halve or double a scale, or that rounding the scale spoils, is not
    taken.

    Args:
        weight: (out_features, in_features) float32.
        codes: its codes, uint8.
        scales: what they were rounded with.
        hessian: (in_features, in_features), damped.

    Returns:
        The scales, and by how much each row's error falls, (out_features,).
    """
    fitted = scales.scale.clone()
    width = codes.shape[1] // fitted.shape[1]
    residual = weight - scales.weight(codes).dequantize(torch.float32)
    won = torch.zeros(len(weight))
    for group in range(fitted.shape[1]):
        columns = slice(group * width, (group + 1) * width)
        part = codes[:, columns].float().sub_(scales.zero[:, group : group + 1])
        gain = ((residual @ hessian[:, columns]) * part).sum(1)
        curvature = ((part @ hessian[columns, columns]) * part).sum(1)
        old = fitted[:, group].float()
        shared = len(old) == 1
        step = gain.sum(0, keepdim=True) / curvature.sum(0, keepdim=True) if shared else gain / curvature
        step = (old + torch.where(step.abs() < old / 2, step, 0)).to(fitted.dtype).float() - old
        less = step * (2 * gain - step * curvature)
        taken = (less.sum(0, keepdim=True) if shared else less) > 0
        step = torch.where(taken, step, 0)
        won += torch.where(taken, less, 0)
        residual[:, columns].addcmul_(part, step.unsqueeze(1), value=-1)
        fitted[:, group] = (old + step).to(fitted.dtype)
    return Scales(fitted, scales.zero, scales.grid), won


def _sweep(weight: Tensor, factor: Factor, scales: Scales, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round the columns of a weight in GPTQ's order.

    With R the residual weight - rounded and H = L Lᵀ, the error of the product is the sum of (R L)². Column r of R L is
    pivot r times what is left of column r of the weight, with the feedback of the columns after it in `order`, when its
    rounded value is taken away: the best value is the nearest, and the error costs nothing to know.

    Returns:
        Levels (out_features, in_features) in the weight's own order, codes of integers, and the error of each row.
    """
    out_features, in_features = weight.shape
    grid = scales.grid
    height = grid.group_height(out_features)
    # Transposed, a column is contiguous: worth a factor of two.
    residual = weight.T.index_select(0, factor.order)
    scale = scales.steps.T.repeat_interleave(height, 1)
    zero = scales.zero.T.repeat_interleave(height, 1)
    grids = list(zip(scale, -zero, grid.levels - 1 - zero, strict=True))
    groups = factor.order // (in_features // len(scale))
    levels = torch.empty(in_features, out_features, dtype=torch.uint8 if grid.number == "int" else torch.float32)
    total = torch.zeros(out_features)
    for stop in range(in_features, 0, -_COLUMNS):
        batch = slice(max(0, stop - _COLUMNS), stop)
        target = torch.addmm(residual[batch], factor.feedback[stop:, batch].T, residual[stop:])
        feedback = factor.feedback[batch, batch]
        columns = [grids[group] for group in groups[batch].tolist()]
        allowed = None if mask is None else mask.T[factor.order[batch]]
        centred = _round_columns(residual[batch], target, feedback, columns, grid.number, mask=allowed)
        levels[factor.order[batch]] = centred.add_(zero.index_select(0, groups[batch])).to(levels.dtype)
        total += target.mul_(factor.pivots[batch].unsqueeze(1)).square_().sum(0)
    return levels.T.contiguous(), total


def _round_columns(
    residual: Tensor,
    target: Tensor,
    feedback: Tensor,
    grids: Sequence[tuple[Tensor, Tensor, Tensor]],
    number: Number = "int",
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Round columns from the last to the first, each with the feedback of those after it.

    Args:
        residual: (columns, out_features), the weight; becomes the weight minus what it is rounded to.
        target: (columns, out_features), the weight and the feedback of columns outside; becomes what is left of it.
        feedback: (columns, columns), lower triangular with ones on its diagonal.
        grids: of each column scale and least and largest centred code, (out_features,) or (1,).
        number: what the levels are; floating-point ones have their own least and largest.
        mask: (columns, out_features) bool, False where the level is that of zero.

    Returns:
        The centred levels, (columns, out_features) float32.
    """
    centred = torch.empty_like(residual)
    rounded, lefts, codes = residual.unbind(), target.unbind(), centred.unbind()
    weights = feedback.T.contiguous()
    for index in reversed(range(len(rounded))):
        left, code, (scale, low, high) = lefts[index], codes[index], grids[index]
        if index + 1 < len(rounded):
            left.addmv_(residual[index + 1 :].T, weights[index, index + 1 :])
        torch.div(left, scale, out=code)
        if number == "int":
            torch.clamp(code.round_(), low, high, out=code)
        else:
            code.copy_(nearest_number(code, number))
        if mask is not None:
            code.mul_(mask[index])
        rounded[index].addcmul_(code, scale, value=-1)
        left.addcmul_(code, scale, value=-1)
    return centred
