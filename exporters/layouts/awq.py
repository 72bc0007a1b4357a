"""AWQ checkpoints, version GEMM, as AutoAWQ, GPTQModel, vLLM and the ORT-GenAI builder read them.

For a layer `L`:

1. `L.qweight` int32 [in, out / 8]: four-bit codes along the output dimension, eight a word; the lowest four bits are
   column 0 of the eight, the next column 2, then 4, 6, 1, 3, 5, 7.
2. `L.qzeros` int32 [groups, out / 8]: zero points, likewise. A symmetric weight has 8 everywhere.
3. `L.scales` [groups, out].

    weight[out, in] = (code - zero) * scale
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS = 4


class Awq(Layout):
    """4 bits, symmetric or not."""

    name = "awq"
    runtime = common.RUNTIME
    several_grids = False

    def refusal(self, facts: ModelFacts, grid: Grid) -> UsageError | None:
        """Refuse bits, groups, dtypes and shapes that the format or its readers have not."""
        return common.refusal(self.name, facts, grid, bits=(_BITS,))

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
            "qweight": TensorSpec("torch.int32", (in_features, out_features // len(ORDER))),
            "qzeros": TensorSpec("torch.int32", (groups, out_features // len(ORDER))),
            "scales": TensorSpec(f"torch.{dtype}", (groups, out_features)),
        }

    def pack(self, weight: QuantizedWeight, inputs: QuantizedInput | None = None) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the tensors of a layer."""
        return {
            "qweight": _pack(weight.codes.T),
            "qzeros": _pack(common.explicit_zero(weight).T),
            "scales": weight.scale.T.contiguous(),
        }

    def unpack(self, parts: Mapping[str, Tensor], grid: Grid, dtype: str) -> QuantizedWeight:  # noqa: ARG002
        """Return the weight that the parts hold."""
        return common.stored_as(
            grid,
            codes=_unpack(parts["qweight"]).T.contiguous(),
            scale=parts["scales"].T.contiguous(),
            zero=_unpack(parts["qzeros"]).T.contiguous(),
        )

    def config(self, model: ExportableModel) -> dict[str, Any]:
        """Return the `quantization_config`; the modules that are not packed are named one by one."""
        grid = common.only_grid(self.name, model)
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": grid.bits,
            "group_size": common.group_size(grid),
            "zero_point": True,
            "modules_to_not_convert": unpacked_modules(model),
        }

    def notes(self, model: ExportableModel) -> list[str]:
        """Say what opened the artifact, and what readers do with the scales."""
        return common.notes(self.name, model)


def _pack(codes: Tensor) -> Tensor:
    """Pack (rows, columns) along the columns, in AWQ's order."""
    from ..packing import pack_int32

    rows, columns = codes.shape
    return pack_int32(codes.reshape(rows, -1, len(ORDER))[..., list(ORDER)].reshape(rows, columns), _BITS)


def _unpack(packed: Tensor) -> Tensor:
    """Undo `_pack`."""
    from ..packing import unpack_int32

    rows, columns = packed.shape[0], packed.shape[1] * len(ORDER)
    places = [ORDER.index(column) for column in range(len(ORDER))]
    return unpack_int32(packed, _BITS, columns).reshape(rows, -1, len(ORDER))[..., places].reshape(rows, columns)
