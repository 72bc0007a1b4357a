"""AutoRound: rounding learnt block by block, on calibration data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from ..core.block import Block, Linear
from ..core.passes import Need, PassContext, PassResult
from .weights import WeightParams, WeightPass

if TYPE_CHECKING:
    from torch import Tensor

    from .numerics.autoround import Rounding


class AutoroundParams(WeightParams, frozen=True, kw_only=True):
    """Parameters of `autoround`."""

    iterations: Annotated[int, Meta(ge=1, description="Steps of signed gradient descent for each block.")] = 200
    batch_size: Annotated[
        int,
        Meta(ge=1, description="Calibration samples in a step, rounded up to whole batches of about 2048 tokens."),
    ] = 8
    learning_rate: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="Size of the first step, which falls linearly to zero; 1 / iterations by default."),
    ] = None


class Autoround(WeightPass[AutoroundParams]):
    """Learn from each block's output which way to round and how far ranges reach (Cheng et al., 2024).

    All layers of a block are learnt together, by signed gradient descent on the error of the block's output; every
    later block sees the outputs of the quantized ones before it. A block that learning does not bring nearer to the
    floating-point one keeps plain rounding.
    """

    name = "autoround"
    needs = frozenset({Need.CALIBRATION, Need.GRADIENTS})
    numbers = frozenset({"int"})
    Params = AutoroundParams

    def run_block(self, block: Block, linears: Iterable[Linear], context: PassContext) -> PassResult:
        """Quantize `linears`."""
        import torch

        from .numerics.autoround import Rounding, learn

        dtype, clip = getattr(torch, block.dtype), self.params.clip == "mse"
        roundings = {
            linear: Rounding(block.weight(linear), grid, dtype, clip=clip, mask=block.mask(linear))
            for linear in linears
            for grid in [self.scheme(linear.name, context.allocation)]
        }
        if not roundings:
            return PassResult()
        expected = [block.output(index) for index in range(block.batches)]
        # The next block normalizes each token before it reads it, so the error counts relative to the token's length: a
        # few tokens with huge activations would outweigh all others.
        energy = [output.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny) for output in expected]
        plain = {linear: rounding.quantized() for linear, rounding in roundings.items()}

        def loss(index: int) -> Tensor:
            made = block.output(index, {linear: rounding.weight() for linear, rounding in roundings.items()})
            return ((made - expected[index]).square().sum(-1) / energy[index]).mean()

        learnt = learn(
            list(roundings.values()),
            loss,
            batches=block.batches,
            iterations=self.params.iterations,
            at_once=-(-self.params.batch_size // len(expected[0])),
            rate=self.params.learning_rate,
            generator=torch.Generator().manual_seed(context.seed),
        )
        better = learnt.after < learnt.before
        for linear, rounding in roundings.items():
            block.quantize(linear, rounding.quantized() if better else plain[linear])
        return self._result(block, roundings, learnt.before, learnt.after)

    def _result(self, block: Block, roundings: dict[Linear, Rounding], before: float, after: float) -> PassResult:
        result = PassResult(changed=[linear.name for linear in roundings])
        result.metrics["error_max_ratio"] = min(after / before, 1.0) if before else 1.0
        if after >= before:
            result.notes.append(f"{block.name}: learning did not lessen the error of its output; rounded to nearest")
            result.metrics["rounded_to_nearest_count"] = len(roundings)
            return result
        still = [linear.name for linear, rounding in roundings.items() if not rounding.moved]
        for name in still:
            result.notes.append(f"{name}: no calibration token reaches it; rounded to nearest")
        if still:
            result.metrics["rounded_to_nearest_count"] = len(still)
        return result
