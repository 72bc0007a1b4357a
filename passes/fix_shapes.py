"""`fix-shapes`: varying sizes become numbers, for engines that compile a graph for one size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

import msgspec
from msgspec import Meta

from ..core.errors import UsageError
from ..core.params import Params
from ..core.passes import GraphPass, PassResult

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..core.facts import ModelFacts
    from ..core.graph import GraphModel
    from ..core.passes import PassContext
    from ..core.target import Target

_Size = Annotated[int, Meta(ge=1)]
_PAST, _TOTAL = "past_sequence", "total_sequence"


class FixShapesParams(Params, frozen=True):
    """Sizes of the varying axes of the inputs."""

    batch: Annotated[_Size | None, Meta(description="Texts in a batch.")] = None
    sequence: Annotated[_Size | None, Meta(description="Tokens of a text that go in at once.")] = None
    axes: Annotated[
        dict[str, Annotated[int, Meta(ge=0)]],
        Meta(description="Further axes by the name that the graph gives them, such as `past_sequence: 0`."),
    ] = msgspec.field(default_factory=dict[str, int])


class FixShapes(GraphPass[FixShapesParams]):
    """Give varying axes a size, and fold what became constant."""

    name: ClassVar[str] = "fix-shapes"
    Params: ClassVar[type[Params]] = FixShapesParams

    def check(self, facts: ModelFacts, target: Target) -> None:
        """Refuse parameters that fix nothing.

        Raises:
            UsageError: no size is given.
        """
        del facts, target
        if not self.fixed_axes():
            raise UsageError(
                f"`{self.name}` has no size to fix",
                where="neither batch nor sequence, and no axes",
                hint="give it sizes, such as `fix-shapes: {batch: 1, sequence: 128}`",
            )

    def fixed_axes(self) -> Mapping[str, int]:
        """Return the sizes that the parameters give."""
        named = {"batch": self.params.batch, "sequence": self.params.sequence}
        return {name: size for name, size in named.items() if size is not None} | self.params.axes

    def run(self, model: GraphModel, context: PassContext) -> PassResult:
        """Fix the sizes.

        Raises:
            UsageError: the graph has no axis of that name.
        """
        from ..graphs.folding import Size, fold
        from ..graphs.shapes import axis_name, fix_axes, input_axes

        del context
        before = Size.of(model.graph)
        known = input_axes(model.graph)
        sizes: dict[str, int] = {}
        for wanted, size in self.fixed_axes().items():
            name = axis_name(model.graph, wanted)
            if name is None:
                axes = "; ".join(f"{axis} (of {', '.join(inputs[:3])})" for axis, inputs in known.items())
                raise UsageError(
                    f"no input has a varying axis `{wanted}`",
                    where=f"axes: {axes or 'none vary'}",
                    hint="name one of these, or leave it out",
                )
            sizes[name] = size
        if _TOTAL in known and _TOTAL not in sizes and {_PAST, "sequence"} <= set(sizes):
            sizes[_TOTAL] = sizes[_PAST] + sizes["sequence"]
        fix_axes(model.graph, sizes)
        fold(model.graph)
        return PassResult(
            changed=[f"{name} = {size}" for name, size in sizes.items()],
            metrics={"axes_count": len(sizes), **before.metrics(Size.of(model.graph))},
        )
