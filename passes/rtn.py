"""Round to nearest."""

from __future__ import annotations

from collections.abc import Iterable

from ..core.block import Block, Linear
from ..core.passes import PassContext, PassResult
from .weights import WeightParams, WeightPass, largest_weights


class RtnParams(WeightParams, frozen=True, kw_only=True):
    """Parameters of `rtn`."""


class Rtn(WeightPass[RtnParams]):
    """Round each weight to the nearest point of its group's grid. Needs no calibration data."""

    name = "rtn"
    Params = RtnParams

    def run_block(self, block: Block, linears: Iterable[Linear], context: PassContext) -> PassResult:
        """Quantize `linears`."""
        import torch

        from .numerics.grid import round_rows, rows_in_cache

        result = PassResult()
        dtype = getattr(torch, block.dtype)
        chosen = [(linear, self.scheme(linear.name, context.allocation)) for linear in linears]
        tops = largest_weights(block, chosen)
        for linear, grid in chosen:
            shape, top = (linear.out_features, linear.in_features), tops.get(linear)
            parts = block.rows(linear, rows_in_cache(*shape, grid))
            quantized = round_rows(parts, shape, grid, dtype, clip=self.params.clip == "mse", largest=top)
            block.quantize(linear, quantized)
            result.changed.append(linear.name)
        return result
