"""HQQ: half-quadratic quantization, without data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from msgspec import Meta

from ..core.block import Block, Linear
from ..core.passes import PassContext, PassResult
from .weights import WeightParams, WeightPass


class HqqParams(WeightParams, frozen=True, kw_only=True):
    """Parameters of `hqq`."""

    norm: Annotated[
        float, Meta(gt=0, le=1, description="The p of the l_p norm of the rounding error that is minimized.")
    ] = 0.7
    beta: Annotated[
        float,
        Meta(gt=0, description="Weight of the quadratic term; the lower, the more of an error counts as an outlier."),
    ] = 10.0
    iterations: Annotated[int, Meta(ge=1, le=1000, description="How often outliers and grid are fitted in turns.")] = 20


class Hqq(WeightPass[HqqParams]):
    """Fit scales and zero points to the weights by a norm that forgives outliers (Badri and Shaji, 2023).

    Needs no calibration data. Zero points stay integers, and a symmetric grid has none: there the scale alone is
    fitted.
    """

    name = "hqq"
    numbers = frozenset({"int"})
    Params = HqqParams

    def run_block(self, block: Block, linears: Iterable[Linear], context: PassContext) -> PassResult:
        """Quantize `linears`."""
        import torch

        from .numerics.grid import fit_scales
        from .numerics.hqq import Splitting, hqq

        params = self.params
        splitting = Splitting(norm=params.norm, beta=params.beta, iterations=params.iterations)
        dtype = getattr(torch, block.dtype)
        result = PassResult()
        for linear in linears:
            weight, grid = block.weight(linear), self.scheme(linear.name, context.allocation)
            start = fit_scales(weight, grid, dtype, clip=params.clip == "mse")
            block.quantize(linear, hqq(weight, start, splitting))
            result.changed.append(linear.name)
        return result
