"""GPTQ checkpoints, as AutoGPTQ, GPTQModel, vLLM and the ORT-GenAI builder read them.

For a layer `L`:

1. `L.qweight` int32 [in * bits / 32, out]: the codes of a column as a dense stream of bits along the input dimension,
   lowest first; with 3 bits, 32 codes fill three words.
2. `L.qzeros` int32 [groups, out * bits / 32]: zero points, such a stream along the output dimension. Version 1 stores
   each less one, version 2 as it is.
3. `L.scales` [groups, out].
4. `L.g_idx` int32 [in]: the group of each input; in order here (`desc_act` false).

    weight[out, in] = (code - zero) * scale
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.activations import QuantizedInput
from ...core.errors import UsageError
from ...core.exports import ExportableModel
from ...core.facts import ModelFacts
from ...core.quantized import Grid, QuantizedWeight
from ..shards import TensorSpec
from . import common
from .layout import Layout, unpacked_modules

if TYPE_CHECKING:
    from torch import Tensor

_BITS = (2, 3, 4, 8)
_VLLM_BITS = (4, 8)
_VLLM_GROUPS = (32, 64, 128, "channel")


class GptqV2(Layout):
    """2, 3, 4 or 8 bits, symmetric or not; GPTQModel reads it."""

    name = "gptq_v2"
    runtime = common.RUNTIME
    several_grids = False
    less: ClassVar[int] = 0
    """What is subtracted from a zero point where it is stored."""

    def refusal(self, facts: ModelFacts, grid: Grid) -> UsageError | None:
        """Refuse bits, groups, dtypes and shapes that the format or its readers have not."""
        return common.refusal(self.name, facts, grid, bits=_BITS)

    def specs(
        self,
        shape: tuple[int, ...],
        dtype: str,
        grid: Grid,
        inputs: QuantizedInput | None = None,  # noqa: ARG002
    ) -> dict[str, TensorSpec]:
        """Return the parts of a layer."""
        out_features, in_features = shape
        groups = in_features // grid.group_width(in_features)
        return {
            "qweight": TensorSpec("torch.int32", (in_features * grid.bits // 32, out_features)),
            "qzeros": TensorSpec("torch.int32", (groups, out_features * grid.bits // 32)),
            "scales": TensorSpec(f"torch.{dtype}", (groups, out_features)),
            "g_idx": TensorSpec("torch.int32", (in_features,)),
        }

    def pack(self, weight: QuantizedWeight, inputs: QuantizedInput | None = None) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the tensors of a layer."""
        import torch

        from ..packing import pack_int32

        _, in_features = weight.shape
        stored = (common.explicit_zero(weight).int() - self.less) & (weight.grid.levels - 1)
        return {
            "qweight": pack_int32(weight.codes, weight.bits).T.contiguous(),
            "qzeros": pack_int32(stored.to(torch.uint8).T, weight.bits),
            "scales": weight.scale.T.contiguous(),
            "g_idx": torch.arange(in_features, dtype=torch.int32) // weight.grid.group_width(in_features),
        }

    def unpack(self, parts: Mapping[str, Tensor], grid: Grid, dtype: str) -> QuantizedWeight:  # noqa: ARG002
        """Return the weight that the parts hold."""
        import torch

        from ..packing import unpack_int32

        groups, out_features = parts["scales"].shape
        in_features = len(parts["g_idx"])
        if not parts["g_idx"].equal(torch.arange(in_features, dtype=torch.int32) // (in_features // groups)):
            raise ValueError("g_idx is not in order")
        stored = unpack_int32(parts["qzeros"], grid.bits, out_features).T
        return common.stored_as(
            grid,
            codes=unpack_int32(parts["qweight"].T, grid.bits, in_features),
            scale=parts["scales"].T.contiguous(),
            zero=((stored.int() + self.less) & (grid.levels - 1)).to(torch.uint8).contiguous(),
        )

    def config(self, model: ExportableModel) -> dict[str, Any]:
        """Return the `quantization_config`."""
        grid = common.only_grid(self.name, model)
        made = {
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            "bits": grid.bits,
            "group_size": common.group_size(grid),
            "desc_act": False,
            "sym": grid.symmetric,
            "lm_head": False,
            "pack_dtype": "int32",
        }
        if any(part.isdigit() for module in unpacked_modules(model) for part in module.split(".")):
            # A layer in a block stays as it is: optimum and vLLM pack the modules that are named here, and no other.
            made["modules_in_block_to_quantize"] = [sorted(model.quantized)]
        return made

    def notes(self, model: ExportableModel) -> list[str]:
        """Say what opened the artifact, and which engines do not read it."""
        grid = common.only_grid(self.name, model)
        made = common.notes(self.name, model)
        if not (grid.symmetric and grid.bits in _VLLM_BITS and grid.group_size in _VLLM_GROUPS):
            made.append(f"vLLM reads gptq with 4 or 8 bits, symmetric, groups of 32, 64, 128 or whole rows, not {grid}")
        if self.less == 0:
            made.append("ONNX Runtime GenAI's builder takes gptq_v2 for gptq and reads it wrongly")
        return made


class Gptq(GptqV2):
    """2, 3, 4 or 8 bits, symmetric: what most readers of GPTQ checkpoints take."""

    name = "gptq"
    less: ClassVar[int] = 1

    def refusal(self, facts: ModelFacts, grid: Grid) -> UsageError | None:
        """Refuse what version 2 refuses, and asymmetric weights."""
        if not grid.symmetric:
            return UsageError(
                "gptq (version 1) cannot hold asymmetric weights",
                where=f"{grid}: it stores each zero point less one, and readers add the ones to whole words: "
                "a zero point of 0 carries into its neighbour",
                hint="use format gptq_v2, which stores zero points as they are, or --symmetric",
            )
        return super().refusal(facts, grid)
