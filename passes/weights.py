"""What passes that put weights on an integer grid have in common."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, TypeVar

from msgspec import Meta

from ..core.errors import UsageError
from ..core.facts import ModelFacts
from ..core.params import Bits, GroupSizeParam, Ignore, Override, Overrides, Params, Symmetric
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
    overrides: Overrides = ()


W = TypeVar("W", bound=WeightParams)


class WeightPass(BlockPass[W]):
    """A block pass that replaces linear layers by quantized ones on one grid."""

    not_after = frozenset({"rtn", "gptq"})
    before_rounding = True

    def grid(self) -> Grid | None:
        """Return the grid of the layers that no override names."""
        params = self.params
        return Grid(bits=params.bits, group_size=params.group_size, symmetric=params.symmetric)

    def ignored(self) -> tuple[str, ...]:
        """Return the patterns of layers that stay as they are."""
        return self.params.ignore

    def override(self, name: str) -> Override | None:
        """Return the first override whose pattern matches layer `name`."""
        return next((one for one in self.params.overrides if matches(name, one.pattern)), None)

    def left_alone(self, name: str) -> str | None:
        """Return why the layer stays as it is: `ignore`, or an override that says so."""
        reason, override = super().left_alone(name), self.override(name)
        if reason is None and override is not None and override.ignore:
            return f"ignored by the override `{override.pattern}`"
        return reason

    def grid_for(self, name: str, allocation: Mapping[str, int] = MappingProxyType({})) -> Grid | None:
        """Return the grid on which layer `name` is put, None if it is left alone or in floating point."""
        return None if super().grid_for(name) is None else self.scheme(name, allocation)

    def scheme(self, name: str, allocation: Mapping[str, int] = MappingProxyType({})) -> Grid:
        """Return the grid of layer `name`: an override's word goes before allocated bits, those before `bits`."""
        params, override = self.params, self.override(name) or Override(pattern=name)
        return Grid(
            bits=allocation.get(name, params.bits) if override.bits is None else override.bits,
            group_size=params.group_size if override.group_size is None else override.group_size,
            symmetric=params.symmetric if override.symmetric is None else override.symmetric,
        )

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
        self._check_overrides(names)
        self._check_group_size(facts)

    def _check_overrides(self, names: list[str]) -> None:
        check_patterns([one.pattern for one in self.params.overrides], names, where=f"{self._where()}, overrides")
        for one in self.params.overrides:
            if one == Override(pattern=one.pattern):
                raise UsageError(
                    f"the override `{one.pattern}` changes nothing",
                    where=self._where(),
                    hint="say what is different there: bits, group_size, symmetric or ignore",
                )

    def _check_group_size(self, facts: ModelFacts) -> None:
        for linear in facts.linears:
            grid = None if self.left_alone(linear.name) else self.scheme(linear.name)
            if grid is None or grid.divides(linear.in_features):
                continue
            override = self.override(linear.name)
            if override is not None and override.group_size is not None:
                raise UsageError(
                    f"cannot group `{linear.name}`",
                    where=f"{self._where()}, override `{override.pattern}`: its {linear.in_features} inputs are "
                    f"not a multiple of group size {grid.group_size}",
                    hint=f"give the override a group_size that divides {linear.in_features}, or `channel`",
                )
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
