"""AWQ: activation-aware scales and clipped ranges, then rounding to nearest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from ..core.model import Block, Linear, Product, Stage
from ..core.passes import Need, PassContext, PassResult, Skip
from ..core.quantized import Grid
from .weights import WeightParams, WeightPass

if TYPE_CHECKING:
    from torch import Tensor

    from .numerics.awq import Candidate
    from .numerics.gptq import Hessian


class AwqParams(WeightParams, frozen=True, kw_only=True):
    """Parameters of `awq`."""

    clip: Annotated[
        Literal["mse", "none"],
        Meta(description="Shrink the range of each group to where the squared error is smallest, or keep it whole."),
    ] = "mse"
    ratios: Annotated[int, Meta(ge=1, le=100, description="Exponents tried between 0 and 1 for the scales.")] = 20
    trials: Annotated[
        int,
        Meta(
            ge=0,
            le=40,
            description="How many of the best scales are judged by the block's output; 0 trusts the layer's own.",
        ),
    ] = 0
    scales_only: Annotated[
        bool, Meta(description="Only balance, for `gptq` or another rounding pass on the same grid to follow.")
    ] = False


class Awq(WeightPass[AwqParams]):
    """Scale the input channels that matter most, clip ranges, and round to nearest (Lin et al., 2024).
    """

    name = "awq"
    needs = frozenset({Need.CALIBRATION})
    Params = AwqParams

    def grid(self) -> Grid | None:
        """Return the grid; None when only scales are moved."""
        return None if self.params.scales_only else self._grid()

    def run_block(self, block: Block, linears: Iterable[Linear], context: PassContext) -> PassResult:  # noqa: ARG002
        """Balance all products, then quantize `linears` stage by stage."""
        wanted = set(linears)
        result = PassResult()
        for stage in block.stages():
            result.absorb(self._balance_stage(block, stage, wanted))
        if self.params.scales_only:
            return result
        result.skipped.clear()
        result.changed.clear()
        for stage in block.stages():
            result.absorb(self._quantize_stage(block, stage, wanted))
        return result

    def _balance_stage(self, block: Block, stage: Stage, wanted: set[Linear]) -> PassResult:
        from .numerics.gptq import Hessian

        result = PassResult()
        chosen = tuple(p for p in stage if wanted.intersection(p.linears) and block.channels(p) is not None)
        hessians = {product: Hessian(product.in_features) for product in chosen}
        if chosen:
            block.collect(chosen, lambda product, rows: hessians[product].add(rows))
        import torch

        import os
        from .numerics.awq import search
        for product in chosen:
            H = hessians[product].matrix
            best = search([block.weight(l) for l in product.linears], hessians.pop(product).matrix, block.channels(product), self._grid(), getattr(torch, block.dtype), steps=self.params.ratios, clip=bool(os.environ.get("JOINT")))
            if os.environ.get("SHOW"): print(product.linears[0].name, [(f"{c.ratio:.2f} {c.error:.5f}") for c in best[:3]], next(c.error for c in best if c.ratio==0))
            one = self._judge(block, product, best, H)
            if one is not None:
                block.balance(product, one.factors)
                result.changed += [l.name for l in product.linears]
        return result

    def _judge(self, block, product, found, H):
        import os
        import torch

        from .numerics.grid import round_to_nearest
        if self.params.trials == 0:
            return found[0]
        picks = found[: self.params.trials]
        one = next(f for f in found if f.ratio == 0)
        if all(one is not pick for pick in picks):
            picks.append(one)
        channels, dtype = block.channels(product), getattr(torch, block.dtype)
        errors = []
        for pick in picks:
            wide = pick.factors[channels]

            def trial(wide=wide):
                for linear in product.linears:
                    w = block.weight(linear)
                    if os.environ.get("TCLIP"):
                        from .numerics.awq import clip_scales
                        from .numerics.grid import round_to
                        sc = clip_scales(w * wide, H / wide / wide[:, None], self._grid(), dtype, steps=10)
                        block.update(linear, sc.weight(round_to(w * wide, sc)).dequantize(torch.float32) / wide)
                    else:
                        block.update(linear, round_to_nearest(w * wide, self._grid(), dtype).dequantize(torch.float32) / wide)
            errors.append(block.output_error(product.linears, trial))
        return picks[min(range(len(picks)), key=errors.__getitem__)]

    def _quantize_stage(self, block, stage, wanted):
        import os

        import torch

        from .numerics.awq import clip_scales
        from .numerics.gptq import Hessian
        from .numerics.grid import round_to, round_to_nearest
        result = PassResult()
        dtype = getattr(torch, block.dtype)
        if self.params.clip == "mse":
            hessians = {product: Hessian(product.in_features) for product in stage}
            block.collect(stage, lambda product, rows: hessians[product].add(rows))
        for product in stage:
            for linear in product.linears:
                if linear not in wanted: continue
                w = block.weight(linear)
                noclip = os.environ.get("NOQK") and ("q_proj" in linear.name or "k_proj" in linear.name)
                if self.params.clip == "mse" and not noclip:
                    scales = clip_scales(w, hessians[product].matrix, self._grid(), dtype, steps=24, smallest=float(os.environ.get("CL",".5")))
                    if os.environ.get("REFIT"):
                        from .numerics.gptq import _refit
                        for _ in range(int(os.environ["REFIT"])):
                            scales = _refit(w, round_to(w, scales), scales, hessians[product].matrix)
                    block.quantize(linear, scales.weight(round_to(w, scales)))
                else:
                    block.quantize(linear, round_to_nearest(w, self._grid(), dtype))
                result.changed.append(linear.name)
        return result

    def _grid(self) -> Grid:
        params = self.params
        return Grid(bits=params.bits, group_size=params.group_size, symmetric=params.symmetric)
