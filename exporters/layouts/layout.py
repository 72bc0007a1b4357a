"""The contract of a layout, and what several of them need."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.errors import UsageError
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
    several_grids: ClassVar[bool] = True
    """Whether layers of one checkpoint may lie on different grids."""

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


def grids_refusal(name: str, grids: Collection[Grid]) -> UsageError:
    """Return why weights on several grids are refused by a layout that has words for one."""
    return UsageError(
        f"{name} cannot hold weights on several grids",
        where="; ".join(sorted(map(str, grids))),
        hint="use format compressed-tensors",
    )


def unpacked_modules(model: ExportableModel) -> list[str]:
    """Return the paths of the linear modules that stay in floating point."""
    return sorted(module for module, layer in model.linear_modules().items() if layer not in model.quantized)
