"""SmoothQuant: move outliers of activations into the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from ..core.block import Block, Linear, Product
from ..core.params import Ignore, Params
from ..core.passes import BlockPass, Need, PassContext, PassResult, Skip
from .products import NO_PRODUCER, NO_TOKEN, unreached

if TYPE_CHECKING:
    from torch import Tensor

    from .numerics.smooth import InputRange

_ALPHAS = tuple(step / 20 for step in range(21))
_ROWS_PER_BATCH = 64


class SmoothParams(Params, frozen=True, kw_only=True):
    """Parameters of `smooth`."""

    alpha: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | Literal["search"],
        Meta(
            description="Share of the outliers that goes to the weights; `search` finds it for each layer by the error "
            "of 8-bit weights and activations on samples of its inputs."
        ),
    ] = 0.5
    activations: Annotated[
        Literal["token", "tensor"],
        Meta(
            description="What `search` rounds activations with: a scale for each token, or one for all that is fixed "
            "by the calibration samples."
        ),
    ] = "token"
    ignore: Ignore = ()


class Smooth(BlockPass[SmoothParams]):
    """Move outliers of activations into the weights, where they do less harm (Xiao et al., 2023).

    The channels of a layer's input are divided by factors where they are made, in a norm or in the rows of an earlier
    layer, and the columns of the weights multiplied by them, so the function stays as it was. Layers that share an
    input with one that is not ignored are scaled along with it.
    """

    name = "smooth"
    needs = frozenset({Need.CALIBRATION})
    before_rounding = True
    Params = SmoothParams

    def ignored(self) -> tuple[str, ...]:
        """Return the patterns of layers that stay as they are."""
        return self.params.ignore

    def run_block(self, block: Block, linears: Iterable[Linear], context: PassContext) -> PassResult:  # noqa: ARG002
        """Smooth the inputs of `linears`."""
        from .numerics.smooth import InputRange

        wanted = set(linears)
        chosen = [one for stage in block.stages() for one in stage if wanted.intersection(one.linears)]
        movable = tuple(product for product in chosen if block.channels(product) is not None)
        rows = _ROWS_PER_BATCH if self.params.alpha == "search" else 0
        ranges = {product: InputRange(product.in_features, rows) for product in movable}
        if movable:
            # Smoothing one input leaves all others as they were, so one look at the samples is enough.
            block.collect(movable, lambda product, seen: ranges[product].add(seen))
        result = PassResult()
        for product in chosen:
            result.absorb(self._smooth(block, product, ranges.get(product)))
        result.skipped += unreached(block, wanted)
        return result

    def _smooth(self, block: Block, product: Product, inputs: InputRange | None) -> PassResult:
        names = [linear.name for linear in product.linears]
        channels = block.channels(product)
        if inputs is None or channels is None:
            return PassResult(skipped=[Skip(name, NO_PRODUCER) for name in names])
        if not inputs.seen:
            return PassResult(skipped=[Skip(name, NO_TOKEN) for name in names])
        factors = self._factors(inputs, [block.weight(linear) for linear in product.linears], channels)
        if factors is None:
            return PassResult(skipped=[Skip(name, "no scale lowers its error") for name in names])
        block.balance(product, factors)
        return PassResult(changed=names, metrics={"smoothed_products_count": 1})

    def _factors(self, inputs: InputRange, weights: list[Tensor], channels: Tensor) -> Tensor | None:
        """Return the factors; None when the search finds none better than to leave the input as it is."""
        import torch

        from .numerics.smooth import int8_error, smoothing_factors

        alpha = self.params.alpha
        if alpha != "search":
            return smoothing_factors(inputs.largest, weights, channels, alpha)
        sample = inputs.sample()
        largest = inputs.largest if self.params.activations == "tensor" else None
        best, found = int8_error(sample, weights, torch.ones(len(channels)), largest=largest), None
        for tried in _ALPHAS:
            factors = smoothing_factors(inputs.largest, weights, channels, tried)
            error = int8_error(sample, weights, factors[channels], largest=largest)
            if error < best:
                best, found = error, factors
        return found
