"""GPTQ: second-order rounding, block by block, on calibration data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from ..core.block import Block, Linear, Product, Stage
from ..core.passes import Need, PassContext, PassResult, Skip
from ..core.quantized import Grid
from .products import among, hessians_and_drifts_of, hessians_of, in_parts, stacked_mask
from .weights import WeightParams, WeightPass, largest_weights

if TYPE_CHECKING:
    from .numerics.correction import Drift
    from .numerics.hessian import Hessian


_STACKED_WEIGHTS = 1 << 23
"""Layers that see the same input are rounded together up to this many weights."""


class GptqParams(WeightParams, frozen=True, kw_only=True):
    """Parameters of `gptq`."""

    act_order: Annotated[
        bool, Meta(description="Round the columns with the most active inputs first; the artifact needs no reordering.")
    ] = True
    prefits: Annotated[
        int,
        Meta(
            ge=0,
            le=20,
            description="How often scales are fitted, before rounding, to the codes that each group gets by itself: "
            "cheap.",
        ),
    ] = 1
    refits: Annotated[
        Annotated[int, Meta(ge=0, le=20)] | None,
        Meta(
            description="How often scales are fitted to the codes after rounding, which takes as long as rounding; "
            "before each further time codes are chosen again. By default 2 up to 3 bits, 1 at 4 bits, 0 above.",
        ),
    ] = None
    correction: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="How far a layer makes up, in its own weight before it is rounded, for what rounding has done "
            "to its input: 0 not at all, 1 as far as least squares allow. Samples run through each block twice then, "
            "and the weights of a block are held twice.",
        ),
    ] = 0.0
    min_tokens: Annotated[
        float,
        Meta(
            ge=0,
            description="A layer, mostly an expert, that fewer calibration tokens reach than this share of its inputs "
            "is rounded to nearest.",
        ),
    ] = 1 / 64
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
    forward pass reaches them, and every later layer and block sees the outputs of the quantized ones before it. With
    `correction` a layer also makes up for what those have done to its input (GPTAQ, Li et al., 2025).
    """

    name = "gptq"
    needs = frozenset({Need.CALIBRATION})
    Params = GptqParams

    def requires(self) -> frozenset[Need]:
        """Return calibration samples, and for a correction what inputs were before anything was rounded."""
        return self.needs | {Need.EXACT_INPUTS} if self.params.correction else self.needs

    def run_block(self, block: Block, linears: Iterable[Linear], context: PassContext) -> PassResult:
        """Quantize `linears` stage by stage."""
        wanted = set(linears)
        reached: set[Linear] = set()
        result = PassResult()
        for stage in block.stages():
            chosen = among(stage, wanted)
            if chosen:
                for part in in_parts(chosen, context.statistics_bytes):
                    result.absorb(self._run_stage(block, part, context))
                reached.update(linear for product in chosen for linear in product.linears)
        for linear in block.linears:
            if linear in wanted - reached:
                result.skipped.append(Skip(linear.name, "the calibration samples never reach it"))
        return result

    def _run_stage(self, block: Block, stage: Stage, context: PassContext) -> PassResult:
        drifts: dict[Product, Drift] = {}
        if self.params.correction:
            hessians, drifts = hessians_and_drifts_of(block, stage)
        else:
            hessians = hessians_of(block, stage)
        result = PassResult()
        for product in stage:
            result.absorb(self._quantize(block, product, hessians.pop(product), drifts.pop(product, None), context))
        return result

    def _quantize(
        self, block: Block, product: Product, hessian: Hessian, drift: Drift | None, context: PassContext
    ) -> PassResult:
        import torch

        from .numerics.correction import corrected
        from .numerics.gptq import gptq
        from .numerics.grid import round_to_nearest
        from .numerics.hessian import factorize

        dtype, clip = getattr(torch, block.dtype), self.params.clip == "mse"
        names = [linear.name for linear in product.linears]
        result = PassResult(changed=names)
        why, factor = self._too_few(hessian.tokens, product.in_features), None
        if why is None:
            factor = factorize(hessian.matrix, damping=self.params.damping, act_order=self.params.act_order)
        grids = [(linear, self.scheme(linear.name, context.allocation)) for linear in product.linears]
        tops = largest_weights(block, grids)
        if factor is None:
            why = why or "its Hessian cannot be factorized"
            for linear, grid in grids:
                weight, top = block.weight(linear), tops.get(linear)
                block.quantize(linear, round_to_nearest(weight, grid, dtype, clip=clip, largest=top))
                result.notes.append(f"{linear.name}: {why}; rounded to nearest")
            result.metrics["rounded_to_nearest_count"] = len(names)
            return result
        result.metrics["damping_max_ratio"] = factor.damping
        if factor.damping > self.params.damping or factor.double:
            precision = " in float64" if factor.double else ""
            result.notes.append(f"{names[0]}: damping raised to {factor.damping:g}{precision} for Cholesky to succeed")
        if factor.dead:
            result.notes.append(f"{names[0]}: {factor.dead} of {product.in_features} inputs are always zero")
        if self.params.correction and drift is None:
            result.metrics["uncorrected_layers_count"] = len(names)
        for grid, group in _stacks((grid, linear) for linear, grid in grids):
            weight = torch.cat([block.weight(linear) for linear in group]) if len(group) > 1 else block.weight(group[0])
            if drift is not None:
                weight = corrected(weight, drift, factor, self.params.correction)
            prefits, refits = self.params.prefits, self._refits(grid.bits)
            top, mask = tops.get(group[0]), stacked_mask(block, group)
            quantized, _ = gptq(
                weight, factor, grid, dtype, clip=clip, prefits=prefits, refits=refits, largest=top, mask=mask
            )
            start = 0
            for linear in group:
                block.quantize(linear, quantized.rows(start, start + linear.out_features))
                start += linear.out_features
        return result

    def _too_few(self, tokens: int, in_features: int) -> str | None:
        """Return why a Hessian says too little, None when enough tokens were seen."""
        if not tokens:
            return "no calibration token reaches it"
        least = math.ceil(self.params.min_tokens * in_features)
        return f"{tokens} calibration tokens reach it, {least} are needed" if tokens < least else None

    def _refits(self, bits: int) -> int:
        """Return how often to refit: on a coarse grid scales matter more than anything else, on a fine one hardly."""
        if self.params.refits is not None:
            return self.params.refits
        return 2 if bits <= 3 else 1 if bits == 4 else 0


def _stacks(layers: Iterable[tuple[Grid, Linear]]) -> list[tuple[Grid, list[Linear]]]:
    """Divide layers of one input into groups that are rounded as one matrix: fewer and longer columns are faster."""
    stacks: list[tuple[Grid, list[Linear]]] = []
    size = 0
    for grid, linear in layers:
        weights = linear.out_features * linear.in_features
        fits = grid.group_size != "tensor" and size + weights <= _STACKED_WEIGHTS
        if stacks and stacks[-1][0] == grid and fits:
            stacks[-1][1].append(linear)
            size += weights
        else:
            stacks.append((grid, [linear]))
            size = weights
    return stacks
