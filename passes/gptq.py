"""GPTQ: second-order rounding, block by block, on calibration data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from ..core.model import Block, Linear, Product, Stage
from ..core.passes import Need, PassContext, PassResult, Skip
from .weights import WeightParams, WeightPass

if TYPE_CHECKING:
    from .numerics.gptq import Hessian


class GptqParams(WeightParams, frozen=True, kw_only=True):
    """Parameters of `gptq`."""

    act_order: Annotated[
        bool, Meta(description="Round the columns with the most active inputs first; the artifact needs no reordering.")
    ] = True
    refits: Annotated[
        int,
        Meta(
            ge=0,
            le=20,
            description="How often scales are fitted to the codes by least squares, and codes chosen again.",
        ),
    ] = 3
    damping: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="Share of the mean diagonal added to the Hessian; raised tenfold until Cholesky succeeds.",
        ),
    ] = 0.01


class Gptq(WeightPass[GptqParams]):
    """Round weights column by column, each error compensated in the columns still to come (Frantar et al., 2023).

    Layers that see the same input share one Hessian. Inside a block the layers are worked on in the order in which the
    forward pass reaches them, and every later layer and block sees the outputs of the quantized ones before it.
    """

    name = "gptq"
    needs = frozenset({Need.CALIBRATION})
    Params = GptqParams

    def run_block(self, block: Block, linears: Iterable[Linear], context: PassContext) -> PassResult:  # noqa: ARG002
        """Quantize `linears` stage by stage."""
        wanted = set(linears)
        reached: set[Linear] = set()
        result = PassResult()
        for stage in block.stages():
            chosen = tuple(
                Product(members)
                for product in stage
                if (members := tuple(linear for linear in product.linears if linear in wanted))
            )
            if chosen:
                result.absorb(self._run_stage(block, chosen))
                reached.update(linear for product in chosen for linear in product.linears)
        for linear in block.linears:
            if linear in wanted - reached:
                result.skipped.append(Skip(linear.name, "the calibration samples never reach it"))
        return result

    def _run_stage(self, block: Block, stage: Stage) -> PassResult:
        from .numerics.gptq import Hessian

        hessians = {product: Hessian(product.in_features) for product in stage}
        block.collect(stage, lambda product, rows: hessians[product].add(rows))
        result = PassResult()
        for product in stage:
            result.absorb(self._quantize(block, product, hessians.pop(product)))
        return result

    def _quantize(self, block: Block, product: Product, hessian: Hessian) -> PassResult:
        import torch

        from .numerics.gptq import factorize, gptq
        from .numerics.grid import round_to_nearest

        grid, dtype, clip = self.grid(), getattr(torch, block.dtype), self.params.clip == "mse"
        names = [linear.name for linear in product.linears]
        result = PassResult(changed=names)
        factor = factorize(hessian.matrix, damping=self.params.damping, act_order=self.params.act_order)
        if factor is None:
            why = "no calibration token reaches it" if not hessian.tokens else "its Hessian cannot be factorized"
            for linear in product.linears:
                block.quantize(linear, round_to_nearest(block.weight(linear), grid, dtype, clip=clip))
                result.notes.append(f"{linear.name}: {why}; rounded to nearest")
            result.metrics["rounded_to_nearest_count"] = len(names)
            return result
        result.metrics["damping_max_ratio"] = factor.damping
        if factor.damping > self.params.damping or factor.double:
            precision = " in float64" if factor.double else ""
            result.notes.append(f"{names[0]}: damping raised to {factor.damping:g}{precision} for Cholesky to succeed")
        if factor.dead:
            result.notes.append(f"{names[0]}: {factor.dead} of {product.in_features} inputs are always zero")
        for linear in product.linears:
            quantized, _ = gptq(block.weight(linear), factor, grid, dtype, clip=clip, refits=self.params.refits)
            block.quantize(linear, quantized)
        return result
