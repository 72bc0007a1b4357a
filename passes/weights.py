"""What passes that put weights on a grid have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta

from ..core.block import Block, Linear
from ..core.errors import UsageError
from ..core.facts import ModelFacts
from ..core.params import Bits, GroupSizeParam, Ignore, NumberParam, Override, Overrides, Params, Symmetric
from ..core.passes import BlockPass
from ..core.patterns import check_patterns, matches
from ..core.quantized import BLOCK, FLOATS, Grid, GroupSize, Number
from ..core.target import Target

_SMALLEST_GROUP = 16
_DEFAULT_BITS, _DEFAULT_GROUP = 4, 128
_HINTS: Mapping[Number, str] = {
    "int": "give a number of weights, `channel` or `tensor`",
    "fp8": "fp8 has 8 bits, and scales for a `channel`, a number of weights, the `tensor` or a `block`",
    "nvfp4": "leave bits, group_size and symmetric out: nvfp4 has 4 bits, 16 weights share a scale",
    "mxfp4": "leave bits, group_size and symmetric out: mxfp4 has 4 bits, 32 weights share a scale",
}


class WeightParams(Params, frozen=True, kw_only=True):
    """Parameters of every pass that quantizes weights."""

    number: NumberParam = "int"
    bits: Bits = None
    group_size: GroupSizeParam = None
    symmetric: Symmetric = True
    ignore: Ignore = ()
    clip: Annotated[
        Literal["mse", "none"],
        Meta(description="Shrink the range of each group to where the squared error is smallest, or keep it whole."),
    ] = "none"
    overrides: Overrides = ()

    def __post_init__(self) -> None:
        """Put what stands for parameters that were not given, so that records say what was done."""
        bits, group_size = _defaults(self.number)
        if self.bits is None:
            msgspec.structs.force_setattr(self, "bits", bits)
        if self.group_size is None:
            msgspec.structs.force_setattr(self, "group_size", group_size)


def _defaults(number: Number) -> tuple[int, GroupSize]:
    """Return bits and group size of a kind of number where none are given."""
    if number == "int":
        return _DEFAULT_BITS, _DEFAULT_GROUP
    bits, group_size = FLOATS[number]
    return bits, group_size or "channel"


W = TypeVar("W", bound=WeightParams)


class WeightPass(BlockPass[W]):
    """A block pass that replaces linear layers by quantized ones on one grid."""

    not_after = frozenset({"rtn", "gptq"})
    before_rounding = True
    numbers: ClassVar[frozenset[Number]] = frozenset({"int", *FLOATS})
    """The kinds of numbers that the method can choose codes for."""

    def grid(self) -> Grid | None:
        """Return the grid of the layers that no override names."""
        return self._grid(Override(pattern="*"))

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
        return self._grid(self.override(name) or Override(pattern=name), allocation.get(name))

    def _grid(self, override: Override, allocated: int | None = None) -> Grid:
        """Return the grid that an override asks for, or `check` refuses."""
        params = self.params
        number = params.number if override.number is None else override.number
        bits, group_size = _defaults(number)
        if number == params.number:  # what was given for one kind of number says nothing of another
            bits, group_size = params.bits or bits, params.group_size or group_size
        bits, group_size = override.bits or allocated or bits, override.group_size or group_size
        symmetric = params.symmetric if override.symmetric is None else override.symmetric
        return Grid(bits=bits, group_size=group_size, symmetric=symmetric, number=number)

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
        grids = {name: grid for name in names if (grid := self.grid_for(name)) is not None}
        for grid in dict.fromkeys(grids.values()):
            self._check_number(grid)
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

    def _check_number(self, grid: Grid) -> None:
        """Refuse kinds of numbers that the method or the grid has not."""
        number = grid.number
        if number not in self.numbers:
            raise UsageError(
                f"`{self.name}` cannot choose codes of {number}",
                where=f"{self._where()} knows {', '.join(sorted(self.numbers))}",
                hint="use rtn or gptq",
            )
        if number == "int":
            wrong = "groups of 128 x 128" if grid.group_size == "block" else None
        else:
            bits, group_size = FLOATS[number]
            wrong = (
                f"{grid.bits} bits"
                if grid.bits != bits
                else f"group size {grid.group_size}"
                if group_size not in (None, grid.group_size)
                else "zero points"
                if not grid.symmetric
                else None
            )
        if wrong is not None:
            raise UsageError(f"{number} has no {wrong}", where=self._where(), hint=_HINTS[number])

    def _check_group_size(self, facts: ModelFacts) -> None:
        for linear in facts.linears:
            grid = None if self.left_alone(linear.name) else self.scheme(linear.name)
            if grid is None or grid.divides(linear.in_features, linear.out_features):
                continue
            if grid.group_size == "block":
                raise UsageError(
                    f"cannot divide `{linear.name}` into blocks of {BLOCK} x {BLOCK}",
                    where=f"{self._where()}: it is {linear.out_features} x {linear.in_features}",
                    hint="use --group-size channel",
                )
            if grid.number != "int":
                raise UsageError(
                    f"{grid.number} cannot hold `{linear.name}`",
                    where=f"{self._where()}: its {linear.in_features} input features are not a multiple of "
                    f"{grid.group_size}",
                    hint=f'leave it out with --ignore "*.{linear.name.rpartition(".")[2]}", or use --scheme w8a8-fp8',
                )
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


def largest_weights(block: Block, layers: Iterable[tuple[Linear, Grid]]) -> dict[Linear, float]:
    """Return, for layers on nvfp4, the largest magnitude among them and the others in the same module.

    Engines run query, key and value, or gate and up, as one product with one divisor of the scales.
    """
    tops: dict[str, float] = {}
    chosen = [linear for linear, grid in layers if grid.number == "nvfp4"]
    for linear in chosen:
        parent = linear.name.rpartition(".")[0]
        tops[parent] = max(tops.get(parent, 0.0), float(block.weight(linear).abs().max()))
    return {linear: tops[linear.name.rpartition(".")[0]] for linear in chosen}
