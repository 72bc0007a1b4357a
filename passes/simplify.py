"""`simplify`: nodes that change nothing go, chains become one node."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..core.params import Params
from ..core.passes import GraphPass, PassResult

if TYPE_CHECKING:
    from ..core.graph import GraphModel
    from ..core.passes import PassContext


class SimplifyParams(Params, frozen=True):
    """Nothing to choose."""


class Simplify(GraphPass[SimplifyParams]):
    """Take out identities and join chains of casts, reshapes, transposes and slices; results stay as they are."""

    name: ClassVar[str] = "simplify"
    Params: ClassVar[type[Params]] = SimplifyParams

    def run(self, model: GraphModel, context: PassContext) -> PassResult:
        """Simplify."""
        from ..graphs.folding import Size
        from ..graphs.simplification import simplify

        del context
        before = Size.of(model.graph)
        simplify(model.graph)
        return PassResult(metrics=before.metrics(Size.of(model.graph)))
