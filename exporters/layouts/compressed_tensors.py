"""compressed-tensors, format `pack-quantized` (https://github.com/vllm-project/compressed-tensors).

For a layer `L`:

1. `L.weight_packed` int32 [out, ceil(in * bits / 32)]: unsigned codes as a dense stream of bits, lowest first.
2. `L.weight_scale` [out, groups], or [1] per tensor; its dtype is the model's.
3. `L.weight_shape` int64 [2]: [out, in].
4. `L.weight_zero_point`, asymmetric only: unsigned, packed like the codes but along the first axis,
   int32 [ceil(out * bits / 32), groups].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import UsageError
from ...core.exports import ExportableModel
from ...core.facts import ModelFacts
from ...core.quantized import Grid, QuantizedWeight
from ..shards import TensorSpec
from .layout import PLAIN, Layout, conv1d_refusal, unpacked_modules

if TYPE_CHECKING:
    from torch import Tensor

_OTHERWISE = f"use {PLAIN} or --export onnx"


class CompressedTensors(Layout):
    """Any bits, any group size; transformers and vLLM load it."""

    name = "compressed-tensors"

    def refusal(self, facts: ModelFacts, grid: Grid) -> UsageError | None:
        """Refuse what the format has no place for, and what transformers does not load."""
        if refused := conv1d_refusal(self.name, facts):
            return refused
        if grid.group_size == "tensor" and not grid.symmetric:
            return UsageError(
                "compressed-tensors pack-quantized has no asymmetric weights with one scale a tensor",
                where=str(grid),
                hint="use --group-size channel, or --symmetric",
            )
        if not grid.symmetric and any(".experts." in linear.name for linear in facts.linears):
            return UsageError(
                "transformers cannot load asymmetric experts from compressed-tensors",
                where=f"{facts.architecture}, {grid}",
                hint=f"use --symmetric, or {_OTHERWISE}",
            )
        return None

    def specs(self, shape: tuple[int, ...], dtype: str, grid: Grid) -> dict[str, TensorSpec]:
        """Return the parts of a layer."""
        out_features, in_features = shape
        groups = in_features // grid.group_width(in_features)
        scale = (1,) if grid.group_size == "tensor" else (out_features, groups)
        specs = {
            "weight_packed": TensorSpec("torch.int32", (out_features, -(-in_features * grid.bits // 32))),
            "weight_scale": TensorSpec(f"torch.{dtype}", scale),
            "weight_shape": TensorSpec("torch.int64", (2,)),
        }
        if not grid.symmetric:
            specs["weight_zero_point"] = TensorSpec("torch.int32", (-(-out_features * grid.bits // 32), groups))
        return specs

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return the tensors of a layer."""
        import torch

        from ..packing import pack_int32

        scale = weight.scale.reshape(1) if weight.grid.group_size == "tensor" else weight.scale
        parts = {
            "weight_packed": pack_int32(weight.codes, weight.bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }
        if weight.zero_point is not None:
            parts["weight_zero_point"] = pack_int32(weight.zero_point.T, weight.bits).T.contiguous()
        return parts

    def unpack(self, parts: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        """Return the weight that the parts hold."""
        from ..packing import unpack_int32

        out_features, in_features = parts["weight_shape"].tolist()
        scale = parts["weight_scale"]
        zero = None
        if not grid.symmetric:
            zero = unpack_int32(parts["weight_zero_point"].T, grid.bits, out_features).T.contiguous()
        return QuantizedWeight(
            codes=unpack_int32(parts["weight_packed"], grid.bits, in_features),
            scale=scale.reshape(1, 1) if grid.group_size == "tensor" else scale,
            zero_point=zero,
            grid=grid,
        )

    def config(self, model: ExportableModel) -> dict[str, Any]:
        """Return the `quantization_config`: one group of layers for every grid."""
        grids: dict[Grid, list[str]] = {}
        for name, grid in model.quantized.items():
            grids.setdefault(grid, []).append(name)
        groups: dict[str, Any] = {}
        for index, (grid, names) in enumerate(grids.items()):
            targets = ["Linear"] if len(grids) == 1 else sorted(names)
            groups[f"group_{index}"] = {"targets": targets, "weights": weights_args(grid)}
        config = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": unpacked_modules(model),
        }
        return config | ({"dequantize": True} if _must_dequantize(model, grids) else {})


def weights_args(grid: Grid) -> dict[str, Any]:
    """Return compressed-tensors' description of a grid."""
    strategy = grid.group_size if isinstance(grid.group_size, str) else "group"
    args: dict[str, Any] = {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "strategy": strategy}
    if isinstance(grid.group_size, int):
        args["group_size"] = grid.group_size
    return args


def _must_dequantize(model: ExportableModel, grids: Iterable[Grid]) -> bool:
    """Return whether transformers has to multiply the weights out while it loads; other readers do not heed that key.

    As a rule it first builds layers that hold packed weights. It cannot do that with packed zero points, for which it
    makes too much room, nor where its own code for the model touches a layer's `weight`.
    """
    touched = _initialized_by_parent(model.facts.model_type)
    leaves = {name.rpartition(".")[2] for name in model.quantized}
    return any(not grid.symmetric for grid in grids) or bool(leaves & touched)


def _initialized_by_parent(model_type: str) -> frozenset[str]:
    """Return the layers whose `weight` transformers' code for a model (T5, SigLIP) writes to from the module above.

    It does so while it loads. Read from its source text, which is cheaper than trying.
    """
    from importlib.util import find_spec

    spec = find_spec("transformers")
    root = next(iter(spec.submodule_search_locations or ()), None) if spec is not None else None
    if root is None or not model_type.isidentifier():
        return frozenset()
    names: set[str] = set()
    for path in sorted((Path(root) / "models" / model_type).glob("modeling_*.py")):
        names.update(re.findall(r"init\.\w+_\(\s*module\.(?:\w+\.)*(\w+)\.weight\b", path.read_text(encoding="utf-8")))
    return frozenset(names)
