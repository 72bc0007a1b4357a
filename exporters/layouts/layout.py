"""The contract of a layout, and what several of them refuse or look up alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from ...core.errors import LlmoptError, UsageError
from ...core.exports import ExportableModel
from ...core.facts import ModelFacts
from ...core.quantized import Grid, QuantizedWeight
from ..shards import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = "--export safetensors:format=plain (rounded weights in floating point)"


class Layout:
    """How the codes of a linear layer lie in a checkpoint, and how config.json tells readers so.

    A layer `L` becomes the tensors `L.<part>`. `unpack` undoes `pack`: codes, scales and zero points come back as they
    were, bit for bit.
    """

    name: ClassVar[str]
    runtime: ClassVar[str] = "transformers"
    """The entry of runtimes/ that opens such a checkpoint."""

    def refusal(self, facts: ModelFacts, grid: Grid) -> UsageError | None:
        """Return why the layout or its readers cannot hold a model on this grid, with the nearest that can.

        Args:
            facts: the model's outline; `linears` are the layers to be packed.
            grid: the grid of their weights.
        """
        raise NotImplementedError

    def specs(self, shape: tuple[int, ...], dtype: str, grid: Grid) -> dict[str, TensorSpec]:
        """Return the parts of a layer: dtype and shape of each.

        Args:
            shape: (out_features, in_features).
            dtype: the scale's, as torch names it ("float16").
            grid: the layer's.
        """
        raise NotImplementedError

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return the tensors of a layer by part."""
        raise NotImplementedError

    def unpack(self, parts: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        """Return the weight that the parts hold; on another grid than `grid` where they contradict it."""
        raise NotImplementedError

    def config(self, model: ExportableModel) -> dict[str, Any]:
        """Return the `quantization_config` for config.json, with no more keys than readers need.

        Raises:
            LlmoptError: the layout has no words for how the layers were quantized.
        """
        raise NotImplementedError

    def notes(self, model: ExportableModel) -> list[str]:  # noqa: ARG002
        """Return what the user should know of the artifact and its readers."""
        return []


def conv1d_refusal(name: str, facts: ModelFacts) -> UsageError | None:
    """Refuse weights stored (in, out): every reader of packed weights builds Linear layers."""
    if not any(linear.transposed for linear in facts.linears):
        return None
    return UsageError(
        f"{name} cannot hold {facts.architecture}",
        where="its layers are Conv1D, with weights stored (in, out); readers take Linear layers only",
        hint=f"use {PLAIN} or --export onnx",
    )


def word_refusal(name: str, facts: ModelFacts, *, inputs: int, outputs: int) -> UsageError | None:
    """Refuse layers whose rows or columns do not fill whole 32-bit words.

    Args:
        name: the layout.
        facts: the model's outline.
        inputs: input features of a layer must be a multiple of this.
        outputs: output features likewise.
    """
    for linear in facts.linears:
        for side, width, unit in (("in", linear.in_features, inputs), ("out", linear.out_features, outputs)):
            if width % unit:
                return UsageError(
                    f"{name} cannot hold `{linear.name}`",
                    where=f"{side}_features {width} is not a multiple of {unit}, and codes fill whole 32-bit words",
                    hint=f"use format compressed-tensors, or leave the layer out with --ignore "
                    f'"*.{linear.name.rpartition(".")[2]}"',
                )
    return None


def only_grid(name: str, model: ExportableModel) -> Grid:
    """Return the grid that all layers share.

    Raises:
        LlmoptError: there are several, which the layout's readers have no words for.
    """
    grids = sorted(set(model.quantized.values()), key=str)
    if len(grids) == 1:
        return grids[0]
    raise LlmoptError(
        f"{name} cannot hold weights on several grids",
        where="; ".join(map(str, grids)),
        hint="use format compressed-tensors",
    )


def unpacked_modules(model: ExportableModel) -> list[str]:
    """Return the paths of the linear modules that stay in floating point."""
    return sorted(module for module, layer in model.linear_modules().items() if layer not in model.quantized)


def stored_symmetric(weight: QuantizedWeight) -> QuantizedWeight:
    """Return a weight read with explicit zero points as a symmetric one, if every one of them is the midpoint."""
    assert weight.zero_point is not None
    if not bool((weight.zero_point == weight.grid.midpoint).all()):
        return weight
    return replace(weight, zero_point=None, grid=msgspec.structs.replace(weight.grid, symmetric=True))


def explicit_zero(weight: QuantizedWeight) -> Tensor:
    """Return the zero points, (out_features, groups) uint8, those of a symmetric grid written out."""
    import torch

    if weight.zero_point is not None:
        return weight.zero_point
    return torch.full(weight.scale.shape, weight.grid.midpoint, dtype=torch.uint8)


def scale_note(model: ExportableModel) -> list[str]:
    """Return a note where scales are not float16, the convention of GPTQ and AWQ checkpoints."""
    dtype = next(model.tensor_specs()[f"{layer}.weight"][0] for layer in model.quantized)
    if dtype == "float16":
        return []
    return [
        f"scales are stored in {dtype}, the model's dtype, so that the weights are the same in every format: vLLM and "
        "the ORT-GenAI builder keep it, GPTQModel (and so transformers) rounds scales to float16 as it loads"
    ]
