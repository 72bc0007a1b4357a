"""Units of a model's layers as they lie in its checkpoint tensors, and taking some of them away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.model import ChannelSet, WidthKind

if TYPE_CHECKING:
    from .handle import TorchModel

_STEP = 8

Keep = Callable[[WidthKind, int], int]
"""Gives how many units of a kind, of so many, will stay."""


@dataclass(frozen=True, slots=True)
class Size:
    """Something that config.json sets the number of.

    Attributes:
        kind: what it is.
        name: the setting.
        units: how many there are; None when the architecture decides.
        settings: gives config.json's settings for another number.
    """

    kind: WidthKind
    name: str
    units: int | None
    settings: Callable[[int], dict[str, Any]]

    def probe(self, keep: Keep | None) -> int:
        """Return another number of them: the one that is wanted, where that is known."""
        if self.units is None:
            return 8 * _STEP
        if keep is not None:
            return keep(self.kind, self.units)
        if self.kind == "heads":
            return max(1, self.units // 2)
        return self.units - _STEP if self.units > _STEP else self.units + _STEP


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of a parameter that consists of units.

    Attributes:
        parameter: its name.
        axis: which one.
        group: the set of units it belongs to; with `{}` for the number of the expert where the first axis counts them.
        units: how many.
        parts: entries of a unit in each part of the axis: the parts lie one after another, and in each the units.
    """

    parameter: str
    axis: int
    group: str
    units: int
    parts: tuple[int, ...]

    def index(self, kept: Tensor) -> Tensor:
        """Return the places of the units `kept`, (units,), in their order."""
        found: list[Tensor] = []
        start = 0
        for width in self.parts:
            found.append((start + kept.unsqueeze(1) * width + torch.arange(width)).reshape(-1))
            start += self.units * width
        return torch.cat(found)


@dataclass(frozen=True, slots=True)
class Cut:
    """What is done to an axis of a checkpoint tensor; `each` when slices of the first axis have their own units."""

    axis: int
    group: str
    of: Axis
    each: bool = False

    def apply(self, tensor: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor with the units of `kept`, by group, in their order."""
        if not self.each:
            index = kept.get(self.group)
            return tensor if index is None else tensor.index_select(self.axis, self.of.index(index))
        slices = [
            one if index is None else one.index_select(self.axis - 1, self.of.index(index))
            for expert, one in enumerate(tensor)
            for index in [kept.get(self.group.format(expert))]
        ]
        return torch.stack(slices)


@dataclass(slots=True)
class Channels:
    """The units that a model may lose; the implementation of `core.model.Channels`.

    Attributes:
        sets: what units are chosen from.
    """

    sets: tuple[ChannelSet, ...]
    _sizes: dict[str, Size]
    _cuts: dict[str, list[Cut]]
    _group_size: dict[str, str] = field(default_factory=dict[str, str])

    def kept(self, model: TorchModel, choice: Mapping[str, Sequence[int]]) -> TorchModel:
        """Return the model with no other units than those chosen; see `core.model.Channels`."""
        settings: dict[str, Any] = {}
        counts: dict[str, int] = {}
        for name, units in choice.items():
            size = self._group_size[name]
            if counts.setdefault(size, len(units)) != len(units):
                raise ValueError(f"{name} keeps {len(units)} units, another set of `{size}` {counts[size]}")
        for size, count in counts.items():
            settings |= self._sizes[size].settings(count)
        order = {name: torch.tensor(sorted(units)) for name, units in choice.items()}
        tensors = ((name, self.changed(name, model.read(name), order)) for name in model.tensor_specs())
        return model.rewritten(tensors, nested_settings(model.facts.config, settings))

    def changed(self, name: str, tensor: Tensor, order: Mapping[str, Tensor]) -> Tensor:
        """Return checkpoint tensor `name` with the units of `order`, by set, in that order."""
        for cut in self._cuts.get(name, ()):
            tensor = cut.apply(tensor, order)
        return tensor


def nested_settings(config: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings of the language model as they are written into config.json."""
    nested = config.get("text_config")
    return {"text_config": {**nested, **settings}} if isinstance(nested, Mapping) else settings
