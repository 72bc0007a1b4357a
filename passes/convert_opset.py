"""`convert-opset`: the graph in another version of the standard operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from msgspec import Meta

from ..core.errors import UsageError
from ..core.params import Params
from ..core.passes import GraphPass, PassResult

if TYPE_CHECKING:
    from ..core.graph import GraphModel
    from ..core.passes import PassContext


class ConvertOpsetParams(Params, frozen=True):
    """The version."""

    opset: Annotated[int, Meta(ge=13, description="Version of the standard ONNX operators to write.")]


class ConvertOpset(GraphPass[ConvertOpsetParams]):
    """Write the graph in an older or newer version of the standard operators, for the engine that will read it.

    Below version 18 attention is spelled out first, so passes that work on it go before.
    """

    name: ClassVar[str] = "convert-opset"
    not_after: ClassVar[frozenset[str]] = frozenset({"convert-opset"})
    Params: ClassVar[type[Params]] = ConvertOpsetParams

    def run(self, model: GraphModel, context: PassContext) -> PassResult:
        """Convert.

        Raises:
            UsageError: the installed onnx does not know the version, or the graph cannot be had in it.
        """
        from ..graphs.folding import Size
        from ..graphs.opsets import ConversionError, convert_opset, newest_opset, opset_of

        del context
        target, source, size = self.params.opset, opset_of(model.graph), Size.of(model.graph)
        if target > newest_opset():
            raise UsageError(
                f"there is no opset {target}",
                where=f"the installed onnx knows versions up to {newest_opset()}",
                hint=f"use opset {newest_opset()} or less",
            )
        try:
            convert_opset(model.graph, target)
        except ConversionError as error:
            raise UsageError(
                f"the graph cannot be converted from opset {source} to {target}",
                where=str(error),
                hint="choose a version nearer to the graph's own, or leave the pass out",
            ) from None
        return PassResult(
            changed=[f"opset {source} -> {target}"] if source != target else [],
            metrics=size.metrics(Size.of(model.graph)),
        )
