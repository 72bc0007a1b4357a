"""`cast-fp16`: the graph in float16, for engines that are fast with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from msgspec import Meta

from ..core.errors import LlmoptError
from ..core.params import MaxDrop, Params
from ..core.passes import GraphPass, PassResult, Skip

if TYPE_CHECKING:
    from ..core.graph import GraphModel
    from ..core.passes import PassContext

_VOCABULARY, _TEXTS = 128, 4


class CastFp16Params(Params, frozen=True):
    """What becomes float16."""

    io: Annotated[
        Literal["float32", "float16"],
        Meta(description="The dtype of inputs and outputs in floating point; casts stand behind those in float32."),
    ] = "float32"
    headroom: Annotated[
        float,
        Meta(
            ge=1,
            le=1000,
            description="A node stays in float32 where its numbers come as near as this factor to the largest of "
            "float16.",
        ),
    ] = 2
    max_drop: MaxDrop = 0.001


class CastFp16(GraphPass[CastFp16Params]):
    """Compute in float16, and in float32 where float16 would overflow or lose what matters.

    Which nodes those are the model itself shows: it runs once in float32, on the calibration text or, without any, on
    made-up inputs. Attention is spelled out where no pass has fused it before.
    """

    name: ClassVar[str] = "cast-fp16"
    not_after: ClassVar[frozenset[str]] = frozenset(
        {"cast-fp16", "quantize-dynamic", "quantize-static", "quantize-weights"}
    )
    tries_samples: ClassVar[bool] = True
    Params: ClassVar[type[Params]] = CastFp16Params

    def drop(self) -> float:
        """Return how much may be lost."""
        return self.params.max_drop

    def stored_bits(self) -> tuple[float | None, float | None]:
        """Return 16: nearly all weights are halves."""
        return 16, 16

    def run(self, model: GraphModel, context: PassContext) -> PassResult:
        """Find what must stay in float32, and cast the rest.

        Raises:
            LlmoptError: nothing of the graph is in float32.
        """
        from ..graphs.attention import spell_out
        from ..graphs.halves import to_halves
        from ..graphs.running import made_up
        from ..graphs.shapes import infer_shapes

        spell_out(model.graph)
        infer_shapes(model.graph)
        notes: list[str] = []
        feeds = list(model.feeds)
        if not feeds:
            text = model.facts.config.get("text_config") or model.facts.config
            vocabulary = text.get("vocab_size") or _VOCABULARY
            feeds = [made_up(model.graph, vocabulary, context.seed + count) for count in range(_TEXTS)]
            notes.append("what overflows was looked for on made-up inputs: calibration text shows more")
        report = to_halves(model.graph, feeds, headroom=self.params.headroom, keep_io=self.params.io == "float32")
        if not report.half:
            raise LlmoptError(
                "no node of the graph can compute in float16",
                where="; ".join(sorted({reason for _, reason in report.full})) or "none computes in float32",
                hint="leave the pass out",
            )
        return PassResult(
            changed=[f"{report.half} nodes"],
            skipped=[Skip(name, reason) for name, reason in report.full],
            metrics={
                "nodes_half_count": report.half,
                "nodes_full_count": len(report.full),
                "casts_count": report.casts,
                "masks_clamped_count": report.masks,
            },
            notes=notes,
        )
