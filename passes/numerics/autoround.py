"""AutoRound: which way each weight is rounded, and how much of its range each group keeps, learnt by signed gradients.

Cheng, Zhang, Shen, Cai, He and Lv (2024), "Optimize Weight Rounding via Signed Gradient Descent for the Quantization
of LLMs". A weight's code is round(w / scale + v), v between -1/2 and 1/2, and the group's range is its extremes times
two shares; v and the shares follow the sign of the gradient of a block's output error, which passes straight through
rounding, with a step that falls linearly to zero.

Two things are not as in the paper. The sign is that of a running mean of gradients: where a minibatch hardly knows a
weight its sign is a coin, and such weights would wander off. And a share's step is so small that the outermost weight
of its group moves as far as an offset does, in steps of the grid: with one step for both, at 4 bits the shares make
more noise than the offsets can mend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.quantized import Grid, QuantizedWeight
from .grid import Scales, fit_scales, grouped

_LEAST_SHARE = 0.5
_MOST_SHARE = 1.0
_MOMENTUM = 0.9


class Rounding:
    """One layer's rounding as something to be learnt.

    Args:
        weight: (out_features, in_features) float32.
        grid: bits, group size, symmetry.
        dtype: the dtype scales will be stored in; training sees scales and weights rounded to it.
        clip: begin with the ranges that have the least squared error instead of whole ones.
        mask: (out_features, in_features) bool, False where the weight is zero and stays so.

    Attributes:
        parameters: offsets like the weight's groups, and shares of the low and high end of each group; leaves.
        moved: whether a gradient has ever reached it.
    """

    def __init__(
        self, weight: Tensor, grid: Grid, dtype: torch.dtype, *, clip: bool = False, mask: Tensor | None = None
    ) -> None:
        self._groups = grouped(weight, grid)
        self._mask = None if mask is None else grouped(mask, grid)
        self._shape, self._grid, self._dtype = weight.shape, grid, dtype
        self._low, self._high = self._groups.amin(-1), self._groups.amax(-1)
        if not grid.symmetric:
            self._low, self._high = self._low.clamp_max(0), self._high.clamp_min(0)
        share = torch.ones_like(self._low)
        if clip:
            whole = fit_scales(weight, grid, torch.float32).scale
            share = (fit_scales(weight, grid, torch.float32, clip=True).scale / whole).clamp(_LEAST_SHARE, _MOST_SHARE)
        self.parameters = [torch.zeros_like(self._groups), share, share.clone()]
        for parameter in self.parameters:
            parameter.requires_grad_()
        self._means = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.moved = False

    def weight(self) -> Tensor:
        """Return the weight that the present rounding gives, exactly as it will be dequantized; differentiable."""
        codes, scale, zero = self._round()
        weight = (codes - zero) * scale.unsqueeze(-1)
        return straight(weight.reshape(self._shape), lambda value: value.to(self._dtype).float())

    def quantized(self) -> QuantizedWeight:
        """Return the present rounding as codes."""
        with torch.no_grad():
            codes, scale, zero = self._round()
        return Scales(scale.to(self._dtype), zero.squeeze(-1), self._grid).weight(codes.reshape(self._shape))

    def step(self, rate: float) -> None:
        """Move every parameter against the sign of its mean gradient, within its limits; forget the gradient.

        Args:
            rate: how far, in steps of the grid.
        """
        shares = (_LEAST_SHARE, _MOST_SHARE, 2 * rate / (self._grid.levels - 1))
        limits = ((-0.5, 0.5, rate), shares, shares)
        with torch.no_grad():
            for parameter, mean, (low, high, step) in zip(self.parameters, self._means, limits, strict=True):
                if parameter.grad is not None:
                    self.moved = self.moved or bool(parameter.grad.any())
                    mean.mul_(_MOMENTUM).add_(parameter.grad)
                    parameter.sub_(mean.sign(), alpha=step).clamp_(low, high)
                    parameter.grad = None

    def _round(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes (rows, groups, width), scale (rows, groups) and zero point (rows, groups, 1), all float32."""
        offset, low_share, high_share = self.parameters
        low, high, top = self._low * low_share, self._high * high_share, self._grid.levels - 1
        scale = torch.maximum(low.abs(), high.abs()) / (top / 2) if self._grid.symmetric else (high - low) / top
        scale = straight(scale, lambda value: value.to(self._dtype).float())
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        if self._grid.symmetric:
            zero = torch.full_like(scale, self._grid.midpoint).unsqueeze(-1)
        else:
            zero = straight(-low / scale, torch.round).clamp(0, top).unsqueeze(-1)
        codes = straight(self._groups / scale.unsqueeze(-1) + offset, torch.round)
        codes = (codes if self._mask is None else codes * self._mask) + zero
        return codes.clamp(0, top), scale, zero


@dataclass(frozen=True, slots=True)
class Learnt:
    """How learning went: the mean loss over all batches before, with plain rounding, and after."""

    before: float
    after: float


def learn(
    roundings: Sequence[Rounding],
    loss: Callable[[int], Tensor],
    *,
    batches: int,
    iterations: int,
    at_once: int,
    rate: float | None,
    generator: torch.Generator,
) -> Learnt:
    """Learn the roundings of a block together.

    Args:
        roundings: of its layers; changed.
        loss: gives the block's error on one batch with the present roundings.
        batches: how many batches there are.
        iterations: steps.
        at_once: batches in a step.
        rate: the first step's size; 1 / iterations when None.
        generator: draws the batches.
    """
    first = 1 / iterations if rate is None else rate
    before = _mean(loss, batches)
    waiting: list[int] = []
    for index in range(iterations):
        for _ in range(min(at_once, batches)):
            waiting = waiting or torch.randperm(batches, generator=generator).tolist()
            loss(waiting.pop()).backward()
        for one in roundings:
            one.step(first * (1 - index / iterations))
    return Learnt(before, _mean(loss, batches))


def _mean(loss: Callable[[int], Tensor], batches: int) -> float:
    with torch.no_grad():
        return sum(float(loss(index)) for index in range(batches)) / batches


def straight(value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `change(value)`, bit for bit, with the gradient of `value`."""
    return _Straight.apply(value, change)  # type: ignore[no-any-return]


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: ARG004
        return change(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None
