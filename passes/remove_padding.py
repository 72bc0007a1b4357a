"""`remove-padding`: an encoder computes its tokens, not the rectangle they are padded to."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Annotated, ClassVar

from msgspec import Meta

from ..core.errors import UsageError
from ..core.params import Params
from ..core.passes import GraphPass, PassResult, Skip

if TYPE_CHECKING:
    from ..core.facts import ModelFacts
    from ..core.graph import Engine, GraphModel
    from ..core.passes import PassContext
    from ..core.target import Target
    from ..graphs.token_index import Layout


_OPERATIONS_PER_BYTE = 10
"""float32 operations that a core does in the time in which it copies a byte: 85e9 and 8e9 a second on AVX-512."""


def break_even(operations: int, moved: int) -> float:
    """Return the share of real tokens in a batch up to which packing pays, estimated.

    A packed token costs its products and what is moved for it, a padded place its products alone; attention is about
    the same. `benchmarks/padding.py` measures it.

    Args:
        operations: of a token's products.
        moved: bytes that are moved for a token.
    """
    return operations / (operations + _OPERATIONS_PER_BYTE * moved) if operations else 0.0


def _layout(engine: Engine, groups: int | None) -> Layout:
    """Return how texts are laid out for an engine.

    More groups pad less and have more nodes, which cost OpenVINO more: 4 of them 6 % on short texts of one length. It
    compiles for each shape that it meets: for MiniLM in 8 bits that takes as long as a batch of short texts. And its
    kernel for attention is slower than the operators one by one up to about 28 tokens in float32, and 80 in bfloat16
    with AMX (`benchmarks/short_texts.py`).
    """
    from ..graphs.token_index import Layout

    if engine == "openvino":
        return Layout(groups or 2, whole=True, short=32)
    return Layout(groups or 8)


class RemovePaddingParams(Params, frozen=True):
    """How attention divides a batch."""

    groups: Annotated[
        Annotated[int, Meta(ge=1, le=16)] | None,
        Meta(
            description="Attention pads texts to the longest of their group: into how many groups of similar length a "
            "batch is divided; 8 when left out. In OpenVINO texts of up to 32 tokens are one group, and the others 2.",
        ),
    ] = None
    required: Annotated[
        bool,
        Meta(description="Refuse a model in which nothing can be done; otherwise it stays as it is, and that is said."),
    ] = True


class RemovePadding(GraphPass[RemovePaddingParams]):
    """Compute everything but attention on the real tokens of a batch, in standard operators.

    Inputs and outputs keep their names and shapes; outputs at padded places are zero. Padding may be on either side, or
    anywhere. For OpenVINO, which compiles for each shape, the row of tokens is filled up to a multiple of the batch;
    attention of short texts is spelled out there, which is faster.
    """

    name: ClassVar[str] = "remove-padding"
    not_after: ClassVar[frozenset[str]] = frozenset({"remove-padding", "fuse", "convert-opset", "fix-shapes"})
    reads_attention: ClassVar[bool] = True
    Params: ClassVar[type[Params]] = RemovePaddingParams

    def check(self, facts: ModelFacts, target: Target) -> None:
        """Refuse models that generate from a prompt alone: their attention is causal.

        Raises:
            UsageError: it is one.
        """
        del target
        if facts.is_causal_lm and self.params.required:
            raise UsageError(
                f"`{self.name}` is for encoders",
                where=f"{facts.architecture} reads its tokens from left to right",
                hint="leave the pass out",
            )

    def run(self, model: GraphModel, context: PassContext) -> PassResult:
        """Rewrite the graph.

        Raises:
            UsageError: the graph has no mask of tokens, or no attention that could be packed.
        """
        from ..graphs.padding import remove_padding
        from ..graphs.products import products

        del context
        inputs = [str(value.name) for value in model.graph.graph.inputs]
        if "attention_mask" not in inputs:
            return self._nothing(
                f"`{self.name}` needs a mask of tokens",
                f"the graph's inputs are {', '.join(inputs)}, nothing is padded",
            )
        report = remove_padding(model.graph, _layout(model.engine, self.params.groups))
        if not report.attentions:
            reasons = "; ".join(sorted({reason for _, reason in report.left})) or "no attention was recognized"
            return self._nothing(f"`{self.name}` finds nothing to do in {model.facts.architecture}", reasons)
        weights = sum(prod(product.matrix().shape) for product in products(model.graph))
        fill = break_even(2 * weights, report.moved)
        return PassResult(
            changed=[f"{report.attentions} attentions"],
            skipped=[Skip(name, reason) for name, reason in report.left],
            metrics={
                "attentions_count": report.attentions,
                "padded_again_count": len(report.padded),
                "break_even_fill_ratio": fill,
            },
            notes=[f"pays where less than about {fill:.0%} of a batch is real tokens"],
        )

    def _nothing(self, what: str, reason: str) -> PassResult:
        """Return a result that says why nothing was done.

        Raises:
            UsageError: something had to be.
        """
        if self.params.required:
            raise UsageError(what, where=reason, hint="leave the pass out, or set `required: false`")
        return PassResult(skipped=[Skip("padding", reason)])
