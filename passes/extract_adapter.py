"""What rounding took from the weights, as an adapter beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from ..core.adapter import AdapterShape
from ..core.block import Block, Linear
from ..core.errors import UsageError
from ..core.facts import ModelFacts
from ..core.params import Params
from ..core.passes import BlockPass, Need, Pass, PassContext, PassResult, Skip
from ..core.target import Target
from .products import among, hessians_of, in_parts, unreached

if TYPE_CHECKING:
    from torch import Tensor


class ExtractAdapterParams(Params, frozen=True, kw_only=True):
    """Parameters of `extract-adapter`."""

    rank: Annotated[int, Meta(ge=1, description="Of each layer's adapter: a column and a row of float32 for each.")] = (
        16
    )
    weighting: Annotated[
        Literal["covariance", "none"],
        Meta(
            description="What is won back: the error of the products, by the second moments of their inputs on "
            "calibration data (`covariance`), or that of the weights, without data (`none`)."
        ),
    ] = "covariance"
    targets: Annotated[
        tuple[str, ...], Meta(description="Layers that get adapters, by the end of their name; all when none is named.")
    ] = ()


class ExtractAdapter(BlockPass[ExtractAdapterParams]):
    """Win back a part of what rounding took: a LoRA beside the quantized weights, found and not trained.

    It is the matrix of the given rank that is nearest to the weights before rounding less those after it, for the
    inputs that the layer sees (Liu et al., 2024, EoRA), or, with `weighting: none`, for all alike: the first step of
    LoftQ (Li et al., 2023). The adapter lies in the artifact's folder `adapter`, as peft, vLLM and TGI load it. Later
    layers and blocks are rounded for the outputs of base and adapter together. It comes right after a pass that rounds,
    in the same sweep; `distill` with the same `lora_rank` may go on from it.
    """

    name = "extract-adapter"
    # An adapter reads what its layer is given, before an engine rounds it.
    not_after = frozenset({"extract-adapter", "quantize-activations", "quantize-kv"})
    Params = ExtractAdapterParams

    def requires(self) -> frozenset[Need]:
        """Return the weights before rounding, and calibration data where inputs are weighed."""
        calibrated = self.params.weighting == "covariance"
        return frozenset({Need.UNROUNDED, *((Need.CALIBRATION,) if calibrated else ())})

    @property
    def _shape(self) -> AdapterShape:
        return AdapterShape(self.params.rank, self.params.targets)

    def keeps_adapter(self, earlier: Sequence[Pass[Any]]) -> AdapterShape:  # noqa: ARG002
        """Return the adapter's shape."""
        return self._shape

    def left_alone(self, name: str) -> str | None:
        """Return that a layer is none of the targets, None where it is one."""
        return None if self._shape.covers(name) else "not among the targets"

    def check(self, facts: ModelFacts, target: Target) -> None:  # noqa: ARG002
        """Refuse a target that no layer is called by."""
        for one in self.params.targets:
            shape = self._shape._replace(targets=(one,))
            if not any(shape.covers(linear.name) for linear in facts.linears):
                known = sorted({linear.name.rpartition(".")[2] for linear in facts.linears})
                raise UsageError(
                    f"target `{one}` matches no layer",
                    where=f"pass `{self.name}`",
                    hint=f"layers end with {', '.join(known) or 'nothing here: the model has none in blocks'}",
                )

    def run_block(self, block: Block, linears: Iterable[Linear], context: PassContext) -> PassResult:
        """Find the adapters of `linears`, each stage for the inputs that those before it leave."""
        result = PassResult(metrics={"adapter_rank_max_count": self.params.rank})
        wanted: list[Linear] = []
        for linear in linears:
            if block.adaptable(linear) is None:
                result.skipped.append(Skip(linear.name, "it is no linear module of its own"))
            else:
                wanted.append(linear)
        if self.params.weighting == "none":
            for linear in wanted:
                self._adapt(block, linear, None, result)
            return result
        for stage in block.stages():
            for part in in_parts(among(stage, wanted), context.statistics_bytes):
                hessians = hessians_of(block, part)
                for product in part:
                    moments = hessians.pop(product).matrix
                    for linear in product.linears:
                        self._adapt(block, linear, moments, result)
        result.skipped += unreached(block, wanted)
        return result

    def _adapt(self, block: Block, linear: Linear, moments: Tensor | None, result: PassResult) -> None:
        """Give a layer its adapter, and note how far the product is from that of the weight before rounding."""
        from .numerics.low_rank import factors, length

        before = block.unrounded(linear)
        lost = before - block.weight(linear)
        whole, without = length(before, moments), length(lost, moments)
        if not without:
            result.skipped.append(Skip(linear.name, "rounding changed nothing that its inputs show"))
            return
        up, down = factors(lost, self.params.rank, moments)
        error = {"without_adapter": without / whole, "with_adapter": length(lost - up @ down, moments) / whole}
        block.adapt(linear, down, up)
        result.layers[linear.name] = error
        result.absorb(
            PassResult(
                metrics={"adapted_layers_count": 1, **{f"error_{name}_max_ratio": at for name, at in error.items()}}
            )
        )
