"""What passes that put weights on an integer grid have in common."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from msgspec import Meta

from ..core.errors import UsageError
from ..core.facts import ModelFacts
from ..core.params import Bits, GroupSizeParam, Ignore, Params, Symmetric
from ..core.passes import BlockPass
from ..core.patterns import check_patterns, matches
from ..core.quantized import Grid
from ..core.target import Target

_SMALLEST_GROUP = 16


class WeightParams(Params, frozen=True, kw_only=True):
    """Parameters of every pass that quantizes weights."""

    bits: Bits = 4
    group_size: GroupSizeParam = 128
    symmetric: Symmetric = True
    ignore: Ignore = ()
    clip: Annotated[
        Literal["mse", "none"],
        Meta(description="Shrink the range of each group to where the squared error is smallest, or keep it whole."),
    ] = "none"


W = TypeVar("W", bound=WeightParams)


class WeightPass(BlockPass[W]):
    """A block pass that replaces linear layers by quantized ones on one grid."""

    not_after = frozenset({"rtn", "gptq"})

    def grid(self) -> Grid:
        """Return the grid."""
        params = self.params
        return Grid(bits=params.bits, group_size=params.group_size, symmetric=params.symmetric)

    def ignored(self) -> tuple[str, ...]:
        """Return the patterns of layers that stay as they are."""
        return self.params.ignore

    def check(self, facts: ModelFacts, target: Target) -> None:  # noqa: ARG002
        """Refuse a model without linear layers, a pattern that matches nothing, a group size that does not divide."""
        if not facts.linears:
            raise UsageError(
                f"`{facts.source}` has no linear layers in repeated blocks to quantize",
                where=f"architecture {facts.architecture or 'unknown'}",
            )
        # The head and the embeddings lie outside the blocks and are left alone anyway; naming them is no mistake.
        names = [linear.name for linear in facts.linears]
        check_patterns(self.params.ignore, [*names, "lm_head", "embed_out", "embed_tokens"], where=self._where())
        self._check_group_size(facts)

    def _check_group_size(self, facts: ModelFacts) -> None:
        grid = self.grid()
        for linear in facts.linears:
            ignored = any(matches(linear.name, pattern) for pattern in self.params.ignore)
            if ignored or grid.divides(linear.in_features):
                continue
            widths = {other.in_features for other in facts.linears}
            fitting = [size for size in (128, 64, 32, _SMALLEST_GROUP) if all(width % size == 0 for width in widths)]
            advice = f"use --group-size {fitting[0]}, or " if fitting else "use --group-size channel, or "
            raise UsageError(
                f"cannot group `{linear.name}`",
                where=f"{self._where()}: its {linear.in_features} input features are not a multiple of "
                f"group size {grid.group_size}",
                hint=f'{advice}leave it out with --ignore "*.{linear.name.rpartition(".")[2]}"',
            )

    def _where(self) -> str:
        return f"pass `{self.name}`"
