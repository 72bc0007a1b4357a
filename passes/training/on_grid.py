"""Weights that learn on the grid on which they are exported.

The forward pass computes with codes and scales exactly as they are dequantized; the gradient passes straight through
rounding (Bengio, Léonard and Courville, 2013, "Estimating or Propagating Gradients Through Stochastic Neurons"), also
to the scales (Esser et al., 2020, "Learned Step Size Quantization"). A scale is learnt as a factor of what it was, so
that one learning rate suits scales of any size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...core.errors import LlmoptError, UsageError
from ...core.quantized import QuantizedWeight
from ..numerics.autoround import straight
from ..numerics.grid import Scales, grouped

if TYPE_CHECKING:
    from ...core.model import ModelHandle

_LEAST_FACTOR = 1e-3
_FACTOR, _ORIGINAL = "parametrizations.weight.0.factor", "parametrizations.weight.original"


class OnGrid(nn.Module):
    """A layer's weight, rounded each time it is used.

    Args:
        start: codes and scales to begin with.
        transposed: the module holds the weight as (in, out).
        scales: whether scales learn.
    """

    base: Tensor
    zero: Tensor

    def __init__(self, start: QuantizedWeight, *, transposed: bool, scales: bool) -> None:
        super().__init__()
        self._grid, self._dtype, self._transposed = start.grid, start.scale.dtype, transposed
        zero = torch.full_like(start.scale, start.grid.midpoint) if start.zero_point is None else start.zero_point
        self.register_buffer("base", start.scale.float(), persistent=False)
        self.register_buffer("zero", zero.float(), persistent=False)
        self.factor = nn.Parameter(torch.ones_like(self.base), requires_grad=scales)

    def forward(self, latent: Tensor) -> Tensor:
        """Return the weight as it will be dequantized, in the shape and dtype of `latent`."""
        matrix = latent.T if self._transposed else latent
        levels, scale = self._rounded(matrix)
        weight = ((levels - self.zero.unsqueeze(-1)) * scale.unsqueeze(-1)).reshape(matrix.shape)
        weight = straight(weight, lambda value: value.to(self._dtype).float())
        return weight.T if self._transposed else weight

    @torch.no_grad()
    def quantized(self, latent: Tensor) -> QuantizedWeight:
        """Return the codes and scales that `forward` computes with."""
        matrix = latent.T if self._transposed else latent
        levels, scale = self._rounded(matrix)
        scales = Scales(scale.to(self._dtype), self.zero, self._grid)
        return scales.weight(levels.reshape(matrix.shape).contiguous())

    def _rounded(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return levels, (rows, groups, weights in a group), and scales, (rows, groups), float32."""
        scale = self.base * self.factor.clamp_min(_LEAST_FACTOR)
        scale = straight(scale, lambda value: value.to(self._dtype).float())
        groups = grouped(matrix.contiguous(), self._grid) / scale.unsqueeze(-1)
        levels = straight(groups, torch.round) + self.zero.unsqueeze(-1)
        return levels.clamp(0, self._grid.levels - 1), scale


def put_on_grids(student: nn.Module, model: ModelHandle, *, scales: bool) -> None:
    """Let the quantized layers of a student in memory learn on their grids; call it when parameters may learn.

    Raises:
        UsageError: a layer lies on a grid of another kind of number.
    """
    for parameter, layer in model.quantized_parameters().items():
        weight = model.quantized_weight(layer)
        if weight.grid.number != "int" or weight.grid.group_size == "block":
            raise UsageError(
                f"`{layer}` cannot learn on its grid, {weight.grid}",
                where="pass `distill` learns on grids of integers",
                hint="let it learn before the pass that rounds",
            )
        module = student.get_submodule(parameter.rpartition(".")[0])
        grid = OnGrid(weight, transposed=model.stored_transposed(layer), scales=scales)
        parametrize.register_parametrization(module, "weight", grid, unsafe=True)


def learnt_weight(model: ModelHandle, state: dict[str, Tensor]) -> Callable[[str], QuantizedWeight]:
    """Return what gives a quantized layer's weight as it was learnt.

    Args:
        model: the student before it learnt.
        state: its learnt parameters.

    Raises:
        LlmoptError: a weight is not what was learnt with; it is computed again and compared bit for bit.
    """
    paths = {layer: parameter.rpartition(".")[0] for parameter, layer in model.quantized_parameters().items()}

    def weight(layer: str) -> QuantizedWeight:
        start, latent = model.quantized_weight(layer), state[f"{paths[layer]}.{_ORIGINAL}"]
        transposed = model.stored_transposed(layer)
        grid = OnGrid(start, transposed=transposed, scales=False)
        factor = state.get(f"{paths[layer]}.{_FACTOR}")
        if factor is not None:
            grid.factor.data.copy_(factor)
        made = grid.quantized(latent)
        used: Any = grid(latent)
        if not torch.equal(made.dequantize().float(), used.T if transposed else used):
            raise LlmoptError(
                f"the codes of `{layer}` are not what it learnt with", hint="report this as a defect of llmopt"
            )
        return made

    return weight
