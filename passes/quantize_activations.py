"""Round the inputs of quantized layers too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from ..core.activations import ActivationGrid, QuantizedInput
from ..core.block import Block, Linear, Product
from ..core.errors import UsageError
from ..core.facts import ModelFacts
from ..core.params import Ignore, Params
from ..core.passes import BlockPass, Need, PassContext, PassResult, Skip
from ..core.target import Target
from .products import NO_TOKEN, unreached

if TYPE_CHECKING:
    from .numerics.observers import Histogram

_DEFAULT_OBSERVER = "mse"


class QuantizeActivationsParams(Params, frozen=True, kw_only=True):
    """Parameters of `quantize-activations`."""

    number: Annotated[
        Literal["int8", "fp8"], Meta(description="What inputs are rounded to: 8-bit integers, or e4m3.")
    ] = "int8"
    scale: Annotated[
        Literal["token", "tensor"],
        Meta(
            description="A scale for each token, found while the model runs, or one for the tensor, fixed by "
            "calibration samples."
        ),
    ] = "token"
    symmetric: Annotated[
        bool, Meta(description="Zero is the integer 0; otherwise, with a fixed scale, the range need not be even.")
    ] = True
    observer: Annotated[
        Literal["minmax", "percentile", "entropy", "mse"] | None,
        Meta(
            description="How a fixed scale is found: the whole range, all but the ends of it, where the distribution "
            "is kept best, or where the squared error is smallest (the default)."
        ),
    ] = None
    percentile: Annotated[
        float, Meta(ge=50, le=100, description="The share of values, in percent, that `percentile` keeps in range.")
    ] = 99.99
    ignore: Ignore = ()


class QuantizeActivations(BlockPass[QuantizeActivationsParams]):
    """Round the inputs of the layers whose weights are quantized, so that engines multiply 8-bit numbers.

    Stands after the pass that quantizes the weights. Every later block sees the rounded inputs of the ones before it.
    """

    name = "quantize-activations"
    not_after = frozenset({"quantize-activations"})
    Params = QuantizeActivationsParams

    def requires(self) -> frozenset[Need]:
        """Return CALIBRATION where the scale is fixed."""
        return frozenset({Need.CALIBRATION}) if self.params.scale == "tensor" else frozenset()

    def input_grid(self) -> ActivationGrid:
        """Return how inputs are rounded."""
        params = self.params
        return ActivationGrid(number=params.number, scale=params.scale, symmetric=params.symmetric)

    def ignored(self) -> tuple[str, ...]:
        """Return the patterns of layers whose inputs stay as they are."""
        return self.params.ignore

    def check(self, facts: ModelFacts, target: Target) -> None:  # noqa: ARG002
        """Refuse parameters that do not go together."""
        params = self.params
        where = f"pass `{self.name}`"
        if not params.symmetric and (params.number == "fp8" or params.scale == "token"):
            raise UsageError(
                "only int8 inputs with one fixed scale can be asymmetric",
                where=f"{where}: number {params.number}, scale {params.scale}",
                hint="leave symmetric out, or use number int8 and scale tensor",
            )
        if params.observer is not None and params.scale == "token":
            raise UsageError(
                "an observer finds a fixed scale",
                where=f"{where}: scale token",
                hint="use scale tensor, or leave observer out",
            )

    def run_block(self, block: Block, linears: Iterable[Linear], context: PassContext) -> PassResult:  # noqa: ARG002
        """Fix how the inputs of `linears` are rounded."""
        if self.params.scale == "token":
            result = PassResult()
            for linear in linears:
                block.quantize_input(linear, QuantizedInput(grid=self.input_grid()))
                result.changed.append(linear.name)
            return result
        return self._calibrated(block, set(linears))

    def _calibrated(self, block: Block, wanted: set[Linear]) -> PassResult:
        import torch

        from .numerics.observers import Histogram, Span, fit_input

        stages = block.stages()
        chosen = tuple(product for stage in stages for product in stage if wanted.intersection(product.linears))
        result = PassResult()
        result.skipped += unreached(block, wanted)
        if not chosen:
            return result
        # Looked at together, before any input of the block is rounded: two forward passes serve them all.
        spans = {product: Span() for product in chosen}
        block.collect(chosen, lambda product, rows: spans[product].add(rows))
        histograms: dict[Product, Histogram] = {product: Histogram(span) for product, span in spans.items()}
        observer = self.params.observer or _DEFAULT_OBSERVER
        if observer != "minmax":
            block.collect(chosen, lambda product, rows: histograms[product].add(rows))
        dtype: torch.dtype = getattr(torch, block.dtype)
        for product in chosen:
            members = [linear for linear in product.linears if linear in wanted]
            if not spans[product].tokens:
                result.skipped += [Skip(linear.name, NO_TOKEN) for linear in members]
                continue
            rounding = fit_input(self.input_grid(), histograms[product], observer, self.params.percentile, dtype)
            for linear in members:
                block.quantize_input(linear, rounding)
                result.changed.append(linear.name)
        return result
