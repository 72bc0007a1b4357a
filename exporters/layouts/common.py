"""What GPTQ and AWQ checkpoints have in common: explicit zero points, half-precision scales, and their readers."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import msgspec

from ...core.errors import UsageError
from ...core.exports import ExportableModel
from ...core.facts import ModelFacts
from ...core.quantized import Grid, QuantizedWeight
from .layout import conv1d_refusal, grids_refusal

if TYPE_CHECKING:
    from torch import Tensor

RUNTIME = "packed-codes"
"""llmopt's own reader: transformers opens such checkpoints with the package gptqmodel alone."""

_GROUPS = (16, 32, 64, 128)
_WORD = 32
_INTEGERS = "its codes are integers"
_DTYPES = ("float16", "bfloat16")


def refusal(name: str, facts: ModelFacts, grid: Grid, *, bits: Collection[int]) -> UsageError | None:
    """Return why a GPTQ or AWQ checkpoint or its readers cannot hold a model on this grid.

    1. Readers build Linear layers, and know `bits` only.
    2. GPTQModel's kernels know groups of 16, 32, 64 and 128 and whole rows; none reads one scale a tensor.
    3. GPTQModel and vLLM's CPU kernels take layers of a multiple of 32 features on both sides.
    4. vLLM computes with such a checkpoint in float16 or bfloat16 only and rounds the scales to that, GPTQModel holds
       them in float16: float32 scales would not be the ones that were written.
    """
    if refused := conv1d_refusal(name, facts):
        return refused
    if grid.number != "int":
        return UsageError(f"{name} cannot hold {grid} weights", where=_INTEGERS, hint="use format compressed-tensors")
    if grid.bits not in bits:
        return UsageError(
            f"{name} cannot hold {grid.bits}-bit weights",
            where=f"its readers know {', '.join(map(str, sorted(bits)))} bits",
            hint=f"use format compressed-tensors, or {_nearest_bits(grid.bits, bits)}",
        )
    if grid.group_size != "channel" and grid.group_size not in _GROUPS:
        return UsageError(
            f"{name} cannot hold {grid}",
            where=f"its readers know groups of {', '.join(map(str, _GROUPS))}, and one scale a row (`channel`)",
            hint="use format compressed-tensors, or --group-size 128 or channel",
        )
    if facts.dtype not in _DTYPES:
        return UsageError(
            f"{name} cannot hold the scales of a {facts.dtype} model",
            where="its readers round scales to float16 or bfloat16, and the weights would no longer be those quantized",
            hint="use format compressed-tensors, or store the model in half precision first: "
            "`passes: [cast: {dtype: float16}, ...]` in the recipe",
        )
    return _shape_refusal(name, facts)


def _nearest_bits(bits: int, known: Collection[int]) -> str:
    return f"--scheme w{min(known, key=lambda other: (abs(other - bits), -other))}a16"


def _shape_refusal(name: str, facts: ModelFacts) -> UsageError | None:
    for linear in facts.linears:
        for side, width in (("in", linear.in_features), ("out", linear.out_features)):
            if width % _WORD:
                return UsageError(
                    f"{name} cannot hold `{linear.name}`",
                    where=f"{side}_features {width} is not a multiple of {_WORD}, and its readers take no other",
                    hint="use format compressed-tensors, or leave the layer out with "
                    f'--ignore "*.{linear.name.rpartition(".")[2]}"',
                )
    return None


def only_grid(name: str, model: ExportableModel) -> Grid:
    """Return the grid that all layers share.

    Raises:
        UsageError: there are several, and a checkpoint's config.json has but one place for bits and group size.
    """
    grids = set(model.quantized.values())
    if len(grids) != 1:
        raise grids_refusal(name, grids)
    return grids.pop()


def group_size(grid: Grid) -> int:
    """Return a grid's group size as such checkpoints write it: -1 for whole rows."""
    return grid.group_size if isinstance(grid.group_size, int) else -1


def explicit_zero(weight: QuantizedWeight) -> Tensor:
    """Return the zero points, (out_features, groups) uint8, those of a symmetric grid written out."""
    import torch

    if weight.zero_point is not None:
        return weight.zero_point
    return torch.full(weight.scale.shape, weight.grid.midpoint, dtype=torch.uint8)


def stored_as(grid: Grid, *, codes: Tensor, scale: Tensor, zero: Tensor) -> QuantizedWeight:
    """Return a weight that was read, on `grid`; on an asymmetric one where a zero point is not the midpoint."""
    if grid.symmetric and bool((zero == grid.midpoint).all()):
        return QuantizedWeight(codes=codes, scale=scale, zero_point=None, grid=grid)
    asymmetric = msgspec.structs.replace(grid, symmetric=False)
    return QuantizedWeight(codes=codes, scale=scale, zero_point=zero, grid=asymmetric)


def notes(name: str, model: ExportableModel) -> list[str]:
    """Return what the user should know of the artifact and its readers."""
    made = [
        f"opened by llmopt's own reader of the codes, not by an engine: transformers reads {name} with gptqmodel only"
    ]
    dtypes = {model.tensor_specs()[f"{layer}.weight"][0] for layer in model.quantized}
    if "bfloat16" in dtypes:
        made.append(
            "scales are bfloat16, the model's dtype: vLLM keeps them, GPTQModel (and so transformers) holds float16, "
            "where a scale below 6e-5 loses bits"
        )
    return made
