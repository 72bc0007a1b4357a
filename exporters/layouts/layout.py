"""The contract of a layout, and what several of them need."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.activations import ActivationGrid, ActivationNumber, QuantizedInput
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

    def activations_refusal(
        self,
        grids: Collection[Grid],  # noqa: ARG002
        inputs: ActivationGrid | None,
        cache: ActivationNumber | None,
    ) -> UsageError | None:
        """Return why the layout or its readers cannot hold activations that are rounded so.

        Args:
            grids: every grid that weights are put on.
            inputs: how the inputs of layers are rounded, None when they are not.
            cache: what keys and values are rounded to, None when they are not.
        """
        return activations_refusal(self.name, inputs, cache)

    def specs(
        self, shape: tuple[int, ...], dtype: str, grid: Grid, inputs: QuantizedInput | None = None
    ) -> dict[str, TensorSpec]:
        """Return the parts of a layer: dtype and shape of each.

        Args:
            shape: (out_features, in_features).
            dtype: the scale's, as torch names it ("float16").
            grid: the layer's.
            inputs: the rounding of its input.
        """
        raise NotImplementedError

    def pack(self, weight: QuantizedWeight, inputs: QuantizedInput | None = None) -> dict[str, Tensor]:
        """Return the tensors of a layer by part."""
        raise NotImplementedError

    def unpack(self, parts: Mapping[str, Tensor], grid: Grid, dtype: str) -> QuantizedWeight:
        """Return the weight that the parts hold; on another grid than `grid` where they contradict it.

        Args:
            parts: as `pack` gave them.
            grid: the layer's.
            dtype: the weight's, as torch names it.
        """
        raise NotImplementedError

    def input_parts(self, inputs: QuantizedInput | None, dtype: str) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the tensors that say how a layer's input is rounded, by part; `dtype` is the model's."""
        return {}

    def others(self, model: ExportableModel) -> dict[str, Tensor]:  # noqa: ARG002
        """Return tensors beside those of the layers, by name."""
        return {}

    def config(self, model: ExportableModel) -> dict[str, Any]:
        """Return the `quantization_config` for config.json, with no more keys than readers need.

        Raises:
            LlmoptError: the layout has no words for how the layers were quantized.
        """
        raise NotImplementedError

    def notes(self, model: ExportableModel) -> list[str]:  # noqa: ARG002
        """Return what the user should know of the artifact and its readers."""
        return []


def activations_refusal(name: str, inputs: ActivationGrid | None, cache: ActivationNumber | None) -> UsageError | None:
    """Refuse rounded activations in a format that has no words for them."""
    what = f"inputs of layers in {inputs}" if inputs else f"keys and values in {cache}" if cache else None
    if what is None:
        return None
    return UsageError(
        f"{name} cannot hold quantized activations",
        where=what,
        hint="use --export safetensors (format compressed-tensors), or leave the activations in floating point",
    )


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
