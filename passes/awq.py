"""AWQ: activation-aware scales and clipped ranges, then rounding to nearest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from ..core.block import Block, Linear, Product, Stage
from ..core.passes import Need, PassContext, PassResult, Skip
from ..core.quantized import Grid, QuantizedWeight
from .products import NO_PRODUCER, NO_TOKEN, hessians_of, unreached
from .weights import WeightParams, WeightPass

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class AwqParams(WeightParams, frozen=True, kw_only=True):
    """Parameters of `awq`."""

    clip: Annotated[
        Literal["mse", "none"],
        Meta(description="Shrink the range of each group to where the squared error is smallest, or keep it whole."),
    ] = "mse"
    ratios: Annotated[int, Meta(ge=1, le=100, description="Exponents tried for the scales, up to 1.")] = 20
    trials: Annotated[
        int,
        Meta(
            ge=0,
            le=7,
            description="How many of the best scales are compared by the output of the block; 0 trusts the error of "
            "the layer's own outputs.",
        ),
    ] = 0
    scales_only: Annotated[
        bool, Meta(description="Only scale, for `gptq` or another pass with the same grid to round.")
    ] = False


class Awq(WeightPass[AwqParams]):
    """Give the input channels that matter most more of the grid, and clip ranges, before rounding (Lin et al., 2024).

    First every layer's input channels are scaled, each scale taken up by what makes the input: a norm, or rows of an
    earlier layer (v for o, up for down). This leaves the function as it was; layers that share an input with one that
    is not ignored are scaled along with it. Then the layers are clipped and rounded in the order in which the forward
    pass reaches them, every later one seeing the outputs of those before it. A layer whose input nothing can be scaled
    for is clipped and rounded only.
    """

    name = "awq"
    needs = frozenset({Need.CALIBRATION})
    numbers = frozenset({"int"})
    Params = AwqParams

    def grid(self) -> Grid | None:
        """Return the grid of the layers that no override names; None when they are only scaled."""
        return None if self.params.scales_only else super().grid()

    def run_block(self, block: Block, linears: Iterable[Linear], context: PassContext) -> PassResult:
        """Scale all inputs, then quantize `linears` stage by stage."""
        wanted = set(linears)
        result = self._scale(block, wanted, context)
        if not self.params.scales_only:
            result = PassResult(metrics=result.metrics)
            for stage in block.stages():
                result.absorb(self._quantize_stage(block, stage, wanted, context))
        result.skipped += unreached(block, wanted)
        return result

    def _scale(self, block: Block, wanted: set[Linear], context: PassContext) -> PassResult:
        """Scale the inputs of all products; as this leaves every other input as it was, one look at them is enough."""
        chosen = [one for stage in block.stages() for one in stage if wanted.intersection(one.linears)]
        hessians = hessians_of(block, tuple(one for one in chosen if block.channels(one) is not None))
        result = PassResult()
        for product in chosen:
            names = [linear.name for linear in product.linears]
            hessian = hessians.pop(product, None)
            if hessian is None or not hessian.tokens:
                reason = NO_PRODUCER if hessian is None else NO_TOKEN
                result.absorb(
                    PassResult(skipped=[Skip(name, reason) for name in names], metrics=_counted(scaled=False))
                )
                continue
            block.balance(product, self._factors(block, product, hessian.matrix, wanted, context))
            result.absorb(PassResult(changed=names, metrics=_counted(scaled=True)))
        return result

    def _factors(
        self, block: Block, product: Product, hessian: Tensor, wanted: set[Linear], context: PassContext
    ) -> Tensor:
        """Return the factors with the smallest error of the product's outputs, or of the block's if it is asked."""
        import torch

        from .numerics.awq import Layer, diagonal_blocks, search

        channels = block.channels(product)
        assert channels is not None, "chosen for having them"
        linears = [linear for linear in product.linears if linear in wanted]
        grids = [self.scheme(linear.name, context.allocation) for linear in linears]
        layers = [Layer(block.weight(linear), grid) for linear, grid in zip(linears, grids, strict=True)]
        clip, dtype = self.params.clip == "mse", getattr(torch, block.dtype)
        found = search(layers, hessian, channels, dtype, steps=self.params.ratios)
        if not self.params.trials:
            return found[0].factors

        def error(factors: Tensor) -> float:
            wide = factors[channels]
            seen = hessian / wide / wide.unsqueeze(1)

            def trial() -> None:
                for linear, grid in zip(linears, grids, strict=True):
                    blocks = diagonal_blocks(seen, grid) if clip else None
                    rounded = _rounded(block.weight(linear) * wide, blocks, grid, dtype)
                    block.update(linear, rounded.dequantize(torch.float32) / wide)

            return block.output_error(linears, trial)

        return min((one.factors for one in found[: self.params.trials]), key=error)

    def _quantize_stage(self, block: Block, stage: Stage, wanted: set[Linear], context: PassContext) -> PassResult:
        import torch

        from .numerics.awq import diagonal_blocks

        chosen = tuple(product for product in stage if wanted.intersection(product.linears))
        hessians = hessians_of(block, chosen) if self.params.clip == "mse" else {}
        dtype = getattr(torch, block.dtype)
        result = PassResult()
        for product in chosen:
            hessian = hessians.pop(product, None)
            unseen = hessian is not None and not hessian.tokens
            for linear in product.linears:
                if linear not in wanted:
                    continue
                grid = self.scheme(linear.name, context.allocation)
                blocks = None if hessian is None or unseen else diagonal_blocks(hessian.matrix, grid)
                block.quantize(linear, _rounded(block.weight(linear), blocks, grid, dtype))
                result.changed.append(linear.name)
                if unseen:
                    result.notes.append(f"{linear.name}: {NO_TOKEN}; rounded to nearest")
                    result.absorb(PassResult(metrics={"rounded_to_nearest_count": 1}))
        return result


def _rounded(weight: Tensor, blocks: Tensor | None, grid: Grid, dtype: torch.dtype) -> QuantizedWeight:
    """Round to nearest, ranges clipped by the `blocks` of the Hessian where there are some."""
    from .numerics.awq import clip_scales
    from .numerics.grid import fit_scales, round_to

    scales = fit_scales(weight, grid, dtype) if blocks is None else clip_scales(weight, blocks, grid, dtype)
    return scales.weight(round_to(weight, scales))


def _counted(*, scaled: bool) -> dict[str, float]:
    return {"scaled_inputs_count": float(scaled), "unscaled_inputs_count": float(not scaled)}
