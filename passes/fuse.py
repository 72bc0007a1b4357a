"""`fuse`: one kernel in place of several nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from msgspec import Meta

from ..core.params import Params
from ..core.passes import GraphPass, PassResult, Skip

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..core.graph import GraphModel
    from ..core.passes import PassContext


class FuseParams(Params, frozen=True):
    """What the engine may take for granted."""

    padding: Annotated[
        Literal["any", "left"],
        Meta(
            description="Where padding may stand in a language model's batch. `left`: in front of texts only, so that "
            "attention counts positions by itself, which is faster; the graph then has no `position_ids`."
        ),
    ] = "any"


class Fuse(GraphPass[FuseParams]):
    """Put the fused operators into the graph that its engine has kernels for, and is faster with."""

    name: ClassVar[str] = "fuse"
    Params: ClassVar[type[Params]] = FuseParams

    def run(self, model: GraphModel, context: PassContext) -> PassResult:
        """Fuse; OpenVINO fuses standard operators by itself."""
        del context
        result = PassResult()
        before = len(list(model.graph.graph.all_nodes()))
        if model.engine == "onnxruntime":
            from ..graphs.fusion import fuse_for_onnxruntime

            report = fuse_for_onnxruntime(
                model.graph, positions=_positions(model.facts.config), left_padded=self.params.padding == "left"
            )
            result.metrics = {f"{kind}_count": count for kind, count in report.counts.items()}
            result.skipped = [Skip(name, reason) for name, reason in report.left]
        after = len(list(model.graph.graph.all_nodes()))
        result.metrics |= {"nodes_before_count": before, "nodes_after_count": after}
        return result


def _positions(config: Mapping[str, Any]) -> int | None:
    """Return how many positions a model knows, None if its configuration does not say."""
    text = config.get("text_config") or config
    found = text.get("max_position_embeddings") or text.get("n_positions")
    return found if isinstance(found, int) else None
