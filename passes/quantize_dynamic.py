"""`quantize-dynamic`: products in 8 bits, without calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..core.params import Ignore, MaxDrop, Params
from ..core.passes import GraphPass, PassResult, Skip

if TYPE_CHECKING:
    from ..core.graph import GraphModel
    from ..core.passes import PassContext


class QuantizeDynamicParams(Params, frozen=True):
    """How much may be lost, and what is left alone."""

    max_drop: MaxDrop = 0.02
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

    def stored_bits(self) -> tuple[float | None, float | None]:
        """Return the bits of a product's weights; what is looked up stays as it is."""
        return 8, None

    def run(self, model: GraphModel, context: PassContext) -> PassResult:
        """Round every product with constant weights but the one that makes the output.

        Raises:
            LlmoptError: the graph has none.
        """
        from ..graphs.int8 import quantize_by_token, selected

        del context
        chosen, left = selected(model.graph, self.params.ignore)
        quantize_by_token(model.graph, chosen)
        return PassResult(
            changed=sorted(one.name for one in chosen),
            skipped=[Skip(name, reason) for name, reason in left],
            metrics={"products_count": len(chosen)},
        )
