"""Rotating checkpoint tensors: what is done to one of them, in float64, rounded once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..core.errors import LlmoptError
from ..core.model import Rotation

_CHUNK = 1 << 24
"""Weights of a matrix that are turned at a time where its rows do not depend on each other, 128 MiB in float64."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What is done to one checkpoint tensor, in this order.

    A rotation that is narrower than the axis it turns is repeated along it, head after head.

    Attributes:
        fill: every value becomes this one (the weight of a norm that was folded); nothing else is done then.
        scale: what the columns are multiplied by, (in_features,) float64.
        gain: what the rows from `start` on are multiplied by, float64.
        columns: Q of the input side; a weight W becomes W Q. An embedding's rows are turned the same way.
        rows: Q of the output side; W becomes Qᵀ W, a bias b becomes b Q.
        start: the first row, or entry of a bias, that `rows` turns.
        transposed: the tensor lies as (in, out).
        vector: it is a bias, (out,) or (experts, out).
    """

    fill: float | None = None
    scale: Tensor | None = None
    gain: Tensor | None = None
    columns: Rotation | None = None
    rows: Rotation | None = None
    start: int = 0
    transposed: bool = False
    vector: bool = False

    def apply(self, tensor: Tensor, *dtypes: torch.dtype) -> list[Tensor]:
        """Return the turned tensor in each of `dtypes`, every one rounded from float64."""
        made = [torch.empty(tensor.shape, dtype=dtype) for dtype in dtypes]
        for part in self._parts(tensor):
            wide = self._turned(tensor[part])
            for one in made:
                one[part] = wide
        return made

    def _parts(self, tensor: Tensor) -> Iterator[slice]:
        """Yield slices of the first axis that can be turned alone: experts, or rows that only their columns turn."""
        alone = tensor.ndim == 3 or not (self.rows or self.transposed)
        step = max(1, _CHUNK // max(1, tensor[0].numel())) if alone else len(tensor)
        for start in range(0, len(tensor), step):
            yield slice(start, start + step)

    def _turned(self, tensor: Tensor) -> Tensor:
        if self.fill is not None:
            return torch.full(tensor.shape, self.fill, dtype=torch.float64)
        wide = tensor.double()
        if self.vector:
            return self._from_start(wide)
        matrix = wide.mT if self.transposed else wide
        if self.scale is not None:
            matrix = matrix * self.scale
        if self.columns is not None:
            matrix = along(self.columns, matrix)
        if self.rows is not None:
            matrix = self._from_start(matrix.mT).mT
        return matrix.mT if self.transposed else matrix

    def _from_start(self, rows: Tensor) -> Tensor:
        """Turn the last axis from `start` on."""
        assert self.rows is not None, "a bias is turned on the output side"
        kept, turned = rows[..., : self.start], rows[..., self.start :]
        return torch.cat([kept, along(self.rows, turned if self.gain is None else turned * self.gain)], -1)


@dataclass(slots=True)
class Turns:
    """What is done to which checkpoint tensors."""

    of: dict[str, Turn] = field(default_factory=dict[str, Turn])

    def add(self, name: str, **changes: Any) -> None:
        """Add to what is done to tensor `name`; `changes` are fields of `Turn`."""
        self.of[name] = replace(self.of.get(name, Turn()), **changes)

    def apply(self, name: str, tensor: Tensor, *dtypes: torch.dtype) -> list[Tensor]:
        """Return tensor `name` turned, in each of `dtypes`.

        Raises:
            LlmoptError: a dtype cannot hold it.
        """
        made = self.of[name].apply(tensor, *dtypes)
        for one in made:
            if not bool(torch.isfinite(one).all()):
                raise LlmoptError(
                    f"the rotated weight `{name}` does not fit into {str(one.dtype).removeprefix('torch.')}",
                    where=f"its largest value before was {float(tensor.abs().max()):.4g}",
                    hint="put `cast: {dtype: bfloat16}` before `rotate`: it has the range of float32",
                )
        return made


def along(rotation: Rotation, rows: Tensor) -> Tensor:
    """Turn the last axis, a multiple of the rotation's width, piece by piece; float64."""
    return rotation.turn(rows.reshape(*rows.shape[:-1], -1, rotation.width)).reshape(rows.shape)
