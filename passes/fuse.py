"""`fuse`: one kernel in place of several nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..core.params import Params
from ..core.passes import GraphPass, PassResult

if TYPE_CHECKING:
    from ..core.graph import GraphModel
    from ..core.passes import PassContext


class FuseParams(Params, frozen=True):
    """Nothing to choose: the engine decides."""


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

            report=fuse_for_onnxruntime(model.graph, positions=model.facts.config.get('max_position_embeddings'))
            print(report)
        after = len(list(model.graph.graph.all_nodes()))
        result.metrics = {"nodes_before_count": before, "nodes_after_count": after}
        return result
