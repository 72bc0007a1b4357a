"""Round to nearest."""

from __future__ import annotations

from collections.abc import Iterable

from ..core.model import Block, Linear
from ..core.passes import PassContext, PassResult
from .weights import WeightParams, WeightPass


class RtnParams(WeightParams, frozen=True, kw_only=True):
    """Parameters of `rtn`."""


class Rtn(WeightPass[RtnParams]):
    """Round each weight to the nearest point of its group's grid. Needs no calibration data."""

    name = "rtn"
    Params = RtnParams

    def run_block(self, block: Block, linears: Iterable[Linear], context: PassContext) -> PassResult:
        """Quantize `linears`."""
        import torch

        from .numerics.grid import round_to_nearest

        result = PassResult()
        dtype = getattr(torch, block.dtype)
        for linear in linears:
            weight, grid = block.stored(linear), self.scheme(linear.name, context.allocation)
            quantized = round_to_nearest(weight, grid, dtype, clip=self.params.clip == "mse")
            block.quantize(linear, quantized)
            result.changed.append(linear.name)
        return result
