"""Quantized activations as data: the inputs of linear layers, and the keys and values that attention keeps.

Unlike weights they are rounded while the model runs. An artifact says how, and holds the scales that were fixed by
calibration; an engine rounds, and llmopt computes as if it were one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from torch import Tensor

ActivationNumber = Literal["int8", "fp8"]
_INT8_LOW, _INT8_HIGH = -128, 127
_SPANS: dict[ActivationNumber, float] = {"int8": 127.5, "fp8": 448.0}
_E4M3_LARGEST = 448.0


class ActivationGrid(msgspec.Struct, frozen=True, kw_only=True):
    """How the inputs of a linear layer are rounded.

    Attributes:
        number: 8-bit integers, or e4m3.
        scale: one for each token, found while the model runs, or one for the tensor, fixed by calibration.
        symmetric: whether zero is always the integer 0.
    """

    number: ActivationNumber
    scale: Literal["token", "tensor"]
    symmetric: bool = True

    @property
    def span(self) -> float:
        """The magnitude that a symmetric scale maps the largest activation to, as compressed-tensors has it."""
        return _SPANS[self.number]

    def __str__(self) -> str:
        """Render as people write it: `int8, a scale for each token`."""
        kind = "" if self.symmetric else " asymmetric"
        return f"{self.number}{kind}, {'a scale for each token' if self.scale == 'token' else 'one fixed scale'}"


class QuantizedInput(msgspec.Struct, frozen=True, kw_only=True):
    """The rounding of one layer's input.

    Attributes:
        grid: how.
        scale: the fixed scale, a float32 number; None when each token has its own.
        zero_point: the integer that stands for zero, -128 to 127; 0 on a symmetric grid.
    """

    grid: ActivationGrid
    scale: float | None = None
    zero_point: int = 0

    def round(self, values: Tensor) -> Tensor:
        """Return what an engine multiplies in the place of `values`, (…, features) floating point, in their dtype."""
        if self.scale is not None:
            return round_activations(values, values.new_tensor(self.scale), self.grid.number, self.zero_point)
        top = values.abs().amax(-1, keepdim=True)
        scale = top / self.grid.span
        # A token of zeros stays as it is with any scale.
        return round_activations(values, scale.masked_fill(top == 0, 1.0), self.grid.number)


class QuantizedCache(msgspec.Struct, frozen=True, kw_only=True):
    """The rounding of the keys and values of one attention module.

    Attributes:
        number: 8-bit integers, or e4m3.
        key_scale: the fixed scale of keys, a float32 number.
        value_scale: that of values.
    """

    number: ActivationNumber
    key_scale: float
    value_scale: float

    def round(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what an engine reads back in the place of keys and values."""
        return (
            round_activations(keys, keys.new_tensor(self.key_scale), self.number),
            round_activations(values, values.new_tensor(self.value_scale), self.number),
        )


def round_activations(values: Tensor, scale: Tensor, number: ActivationNumber, zero_point: int = 0) -> Tensor:
    """Return `values` rounded to the numbers of a kind times `scale`, in their own dtype."""
    scaled = values / scale
    if number == "fp8":
        # Four significant bits, down to steps of 2^-9: what a cast to e4m3 gives.
        exponent = scaled.frexp().exponent.sub(4).clamp_min(-9)
        step = scaled.new_ones(scaled.shape).ldexp(exponent)
        return (scaled / step).round().mul(step).clamp(-_E4M3_LARGEST, _E4M3_LARGEST) * scale
    whole = (scaled + zero_point).clamp(_INT8_LOW, _INT8_HIGH).round()
    return (whole - zero_point) * scale
