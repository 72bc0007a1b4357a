"""`fuse`: one kernel in place of several nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from msgspec import Meta

from ..core.errors import UsageError
from ..core.params import Params
from ..core.passes import GraphPass, PassResult, Skip

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..core.facts import ModelFacts
    from ..core.graph import GraphModel
    from ..core.passes import PassContext
    from ..core.target import Target


class FuseParams(Params, frozen=True):
    """What the engine may take for granted."""

    padding: Annotated[
        Literal["any", "left", "right"],
        Meta(
            description="Where padding may stand in a language model's batch: `left`, in front of texts only, or "
            "`right`, behind them only. Attention then counts positions by itself, which is faster, and the graph has "
            "no `position_ids`; on the right it reads no padding either, which is fastest."
        ),
    ] = "any"
    target: Annotated[
        Literal["cpu", "gpu", "edge"],
        Meta(
            description="Whose kernels are used: ONNX Runtime's for a CPU, those for CUDA, or, for `edge`, standard "
            "operators alone."
        ),
    ] = "cpu"


class Fuse(GraphPass[FuseParams]):
    """Put the fused operators into the graph that its engine has kernels for, and is faster with."""

    name: ClassVar[str] = "fuse"
    Params: ClassVar[type[Params]] = FuseParams

    def check(self, facts: ModelFacts, target: Target) -> None:
        """Refuse `padding` where nothing reads it.

        Raises:
            UsageError: the target is no CPU.
        """
        del facts, target
        if self.params.padding != "any" and self.params.target != "cpu":
            raise UsageError(
                f"`padding: {self.params.padding}` of `{self.name}` is for a CPU",
                where=f"target: {self.params.target}",
                hint="leave one of the two out",
            )

    def run(self, model: GraphModel, context: PassContext) -> PassResult:
        """Fuse; OpenVINO fuses standard operators by itself, and is given feed-forwards as it is fastest with them.

        Raises:
            LlmoptError: for a GPU: an operator is not known to have a kernel there.
        """
        del context
        result, target = PassResult(), self.params.target
        before = len(list(model.graph.graph.all_nodes()))
        if model.engine == "onnxruntime" and target != "edge":
            from ..graphs.fusion import fuse_for_cuda, fuse_for_onnxruntime

            if target == "gpu":
                report = fuse_for_cuda(model.graph)
                result.notes = _of_cuda()
            else:
                positions = _positions(model.facts.config)
                report = fuse_for_onnxruntime(model.graph, positions=positions, padding=self.params.padding)
            result.metrics = {f"{kind}_count": count for kind, count in report.counts.items()}
            result.changed = report.matched
            result.skipped = [Skip(name, reason) for name, reason in report.left]
        elif model.engine == "openvino" and target == "cpu":
            from ..graphs.rows import join_texts

            if joined := join_texts(model.graph):
                result.metrics = {"feed_forwards_in_rows_count": joined}
                result.changed = [f"{joined} feed-forwards on rows of tokens"]
        elif target == "edge":
            result.notes = ["standard operators alone: nothing is fused"]
        after = len(list(model.graph.graph.all_nodes()))
        result.metrics |= {"nodes_before_count": before, "nodes_after_count": after}
        return result


def _of_cuda() -> list[str]:
    """Return what must be said of kernels that could not be asked for."""
    from ..graphs.kernels import CUDA, PUBLISHED, can_be_asked

    if can_be_asked(CUDA):
        return []
    known = f"those that its published table has ({PUBLISHED})"
    return [
        f"the installed ONNX Runtime has no CUDA kernels to ask: fused operators are {known}",
        "the artifact was opened on the CPU only",
    ]


def _positions(config: Mapping[str, Any]) -> int | None:
    """Return how many positions a model knows, None if its configuration does not say."""
    text = config.get("text_config") or config
    found = text.get("max_position_embeddings") or text.get("n_positions")
    return found if isinstance(found, int) else None
