"""`fold`: what is known beforehand is computed beforehand, and nothing is kept twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from msgspec import Meta

from ..core.params import Params
from ..core.passes import GraphPass, PassResult

if TYPE_CHECKING:
    from ..core.graph import GraphModel
    from ..core.passes import PassContext


class FoldParams(Params, frozen=True):
    """How large a constant may become."""

    limit: Annotated[
        int,
        Meta(
            ge=0,
            description="Bytes that a folded constant may have where the constants that it replaces are smaller: "
            "folding should not make a file larger.",
        ),
    ] = 4096


class Fold(GraphPass[FoldParams]):
    """Fold constants and shapes, drop dead and duplicate nodes, and store equal weights once."""

    name: ClassVar[str] = "fold"
    Params: ClassVar[type[Params]] = FoldParams

    def run(self, model: GraphModel, context: PassContext) -> PassResult:
        """Fold."""
        from ..graphs.folding import Size, fold

        del context
        before = Size.of(model.graph)
        fold(model.graph, self.params.limit)
        return PassResult(metrics=before.metrics(Size.of(model.graph)))
