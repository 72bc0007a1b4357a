"""What makes the input of a product, and whether it can take up a scale for it.

SmoothQuant, AWQ and folded norms all rest on one identity: divide the channels of an input by some factors where it is
made, multiply the columns of the layers that read it, and the function stays what it was. What makes an input is found
by trial, not from a table of model families: a candidate (a norm whose output is the input; rows of an earlier linear
layer) is divided by random factors, the product's columns are multiplied, and the block's output on one calibration
batch must stay as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.block import Linear, Product

_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Part:
    """A parameter, or rows of one, that is divided channel by channel.

    Attributes:
        name: its checkpoint tensor, to be written when it changes.
        tensor: the view that is divided; its first axis are the channels.
        offset: 1 for a norm that multiplies by 1 + weight, else 0.
    """

    name: str
    tensor: Tensor
    offset: float = 0.0

    def divide(self, factors: Tensor) -> None:
        """Divide the channels by `factors`, (channels,)."""
        shape = (-1,) + (1,) * (self.tensor.ndim - 1)
        self.tensor.add_(self.offset).div_(factors.reshape(shape)).sub_(self.offset)


@dataclass(frozen=True, slots=True)
class Producer:
    """Makes the input of a product.

    Attributes:
        name: the module or layer, for messages.
        parts: what to divide (a weight and its bias).
        channels: (in_features,) int64, for each input channel the channel of the producer that it comes from.
        norm: the part that is the weight of a norm; None for a linear layer.
    """

    name: str
    parts: tuple[Part, ...]
    channels: Tensor
    norm: Part | None = None

    @property
    def width(self) -> int:
        """Number of independent factors."""
        return int(self.channels.max()) + 1

    def norm_weight(self) -> Tensor | None:
        """Return what the norm multiplies by, (channels,); None for a linear layer."""
        return None if self.norm is None else self.norm.tensor + self.norm.offset


def norm_candidates(norms: Iterable[tuple[str, nn.Module]], names: Callable[[str], str | None]) -> list[Producer]:
    """Return candidates for norm modules: weight (and bias) as they are, or the weight as 1 + weight.

    Args:
        norms: (path, module) of modules with a 1-D weight whose output is the product's input.
        names: checkpoint name of a parameter path, None when it has none.
    """
    found: list[Producer] = []
    for path, module in norms:
        parameters = dict(module.named_parameters(recurse=False))
        known = {key: names(f"{path}.{key}") for key in parameters}
        if "weight" not in parameters or None in known.values():
            continue
        channels = torch.arange(parameters["weight"].shape[0])
        for offset in (0.0, 1.0):
            parts = {
                key: Part(str(known[key]), value.data, offset if key == "weight" else 0.0)
                for key, value in parameters.items()
                if value.ndim == 1
            }
            found.append(Producer(path, tuple(parts.values()), channels, parts["weight"]))
    return found


def linear_candidates(
    product: Product,
    earlier: Iterable[Linear],
    part_of: Callable[[Linear, slice], tuple[Part, ...]],
    head_size: int | None,
) -> list[Producer]:
    """Return candidates for linear layers: the last rows of each, one for one or repeated by heads.

    The last rows, because a fused projection keeps its value or up part at the end.

    Args:
        product: whose input is made.
        earlier: layers of earlier stages, the nearest first.
        part_of: weight and bias of rows of a layer.
        head_size: channels of an attention head; None when the model has none.
    """
    width = product.in_features
    found: list[Producer] = []
    for linear in earlier:
        if linear.out_features >= width:
            rows = slice(linear.out_features - width, linear.out_features)
            found.append(Producer(linear.name, part_of(linear, rows), torch.arange(width)))
        if head_size is None or width % head_size:
            continue
        for rows_count in {linear.out_features, *_value_rows(linear.out_features, width, head_size)}:
            if rows_count < width and width % rows_count == 0 and rows_count % head_size == 0:
                repeats = width // rows_count
                channels = torch.arange(rows_count).reshape(-1, head_size).repeat_interleave(repeats, 0).reshape(-1)
                rows = slice(linear.out_features - rows_count, linear.out_features)
                found.append(Producer(linear.name, part_of(linear, rows), channels))
    return found


def _value_rows(total: int, width: int, head_size: int) -> list[int]:
    """Return the height of the value part of a fused qkv of `total` rows whose queries take `width`."""
    rest = total - width
    return [rest // 2] if rest > 0 and rest % 2 == 0 and (rest // 2) % head_size == 0 else []


def same(first: Any, second: Any) -> bool:
    """Return whether two block outputs agree to rounding: every tensor of them, relative to its largest value."""
    pairs = list(zip(_tensors(first), _tensors(second), strict=True))
    return all(float((a - b).abs().max()) <= _TOLERANCE * max(1e-6, float(a.abs().max())) for a, b in pairs)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
