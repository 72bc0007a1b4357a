"""`quantize-dynamic`: products in 8 bits, without calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from msgspec import Meta

from ..core.errors import LlmoptError
from ..core.params import Ignore, Params
from ..core.passes import GraphPass, PassResult, Skip
from ..core.patterns import matches

if TYPE_CHECKING:
    from ..core.graph import GraphModel
    from ..core.passes import PassContext


class QuantizeDynamicParams(Params, frozen=True):
    """How much may be lost, and what is left alone."""

    max_drop: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="How much of the outputs may be lost, as mean 1 - cosine: the verification refuses more.",
        ),
    ] = 0.02
    ignore: Ignore = ()


class QuantizeDynamic(GraphPass[QuantizeDynamicParams]):
    """Multiply in 8 bits: inputs with a scale for each token, found as the model runs, weights for each output.

    It needs no calibration text, and is slower than `quantize-static`. A text's result does not depend on the texts
    beside it.
    """

    name: ClassVar[str] = "quantize-dynamic"
    not_after: ClassVar[frozenset[str]] = frozenset({"quantize-dynamic"})
    rounds: ClassVar[bool] = True
    Params: ClassVar[type[Params]] = QuantizeDynamicParams

    def drop(self) -> float:
        """Return how much may be lost."""
        return self.params.max_drop

    def run(self, model: GraphModel, context: PassContext) -> PassResult:
        """Round every product with constant weights but the one that makes the output.

        Raises:
            LlmoptError: the graph has none.
        """
        from ..graphs.int8 import candidates, quantize_by_token

        del context
        found, left = candidates(model.graph)
        chosen = [one for one in found if not any(matches(one.name, pattern) for pattern in self.params.ignore)]
        if not chosen:
            raise LlmoptError(
                f"`{self.name}` finds no product to round in {model.facts.architecture}",
                where="; ".join(sorted({reason for _, reason in left})) or "no product has constant float32 weights",
                hint="leave the pass out",
            )
        quantize_by_token(model.graph, chosen)
        ignored = [Skip(one.name, "ignored") for one in found if one not in chosen]
        return PassResult(
            changed=sorted(one.name for one in chosen),
            skipped=[*(Skip(name, reason) for name, reason in left), *ignored],
            metrics={"products_count": len(chosen)},
        )
