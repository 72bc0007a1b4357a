"""Hugging Face checkpoints: plain, or compressed-tensors with the codes packed.

compressed-tensors, format `pack-quantized` (https://github.com/vllm-project/compressed-tensors). For a layer `L`:

1. `L.weight_packed` int32 [out, ceil(in * bits / 32)]: unsigned codes as a dense stream of bits, lowest first.
2. `L.weight_scale` [out, groups], or [1] per tensor; its dtype is the model's.
3. `L.weight_shape` int64 [2]: [out, in].
4. `L.weight_zero_point`, asymmetric only: unsigned, packed like the codes but along the first axis,
   int32 [ceil(out * bits / 32), groups].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from ..core.errors import LlmoptError, UsageError
from ..core.exports import ExportableModel, ExportContext, Exporter, ExportResult
from ..core.facts import ModelFacts
from ..core.params import Params
from ..core.quantized import Grid, QuantizedWeight
from .shards import ShardWriter, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class SafetensorsParams(Params, frozen=True, kw_only=True):
    """Parameters of `safetensors`."""

    format: Annotated[
        Literal["auto", "plain", "compressed-tensors"],
        Meta(
            description="`plain` writes floating-point weights (quantized ones dequantized), `compressed-tensors` "
            "packed codes that transformers and vLLM load; `auto` is the latter when the model is quantized."
        ),
    ] = "auto"
    max_shard_gb: Annotated[float, Meta(gt=0, description="Size at which a new shard is begun, in GB (10^9).")] = 5.0


class Safetensors(Exporter[SafetensorsParams]):
    """A folder that `from_pretrained` of transformers opens; quantized weights as compressed-tensors."""

    name = "safetensors"
    runtime = "transformers"
    Params = SafetensorsParams

    def check(self, facts: ModelFacts, grid: Grid | None) -> None:
        """Refuse what compressed-tensors or its readers cannot hold."""
        if not self._packs(grid):
            if self.params.format == "compressed-tensors":
                raise UsageError(
                    "nothing to pack: no pass quantizes the weights",
                    where="export `safetensors`, format compressed-tensors",
                    hint="add a pass such as rtn or gptq, or use format plain",
                )
            return
        assert grid is not None
        plain = "use --export safetensors:format=plain (rounded weights in floating point) or --export onnx"
        if any(linear.transposed for linear in facts.linears):
            raise UsageError(
                f"compressed-tensors cannot hold {facts.architecture}",
                where="its layers are Conv1D, with weights stored (in, out); readers take Linear layers only",
                hint=plain,
            )
        if grid.group_size == "tensor" and not grid.symmetric:
            raise UsageError(
                "compressed-tensors pack-quantized has no asymmetric weights with one scale a tensor",
                where=str(grid),
                hint="use --group-size channel, or --symmetric",
            )
        if not grid.symmetric and any(".experts." in linear.name for linear in facts.linears):
            raise UsageError(
                "transformers cannot load asymmetric experts from compressed-tensors",
                where=f"{facts.architecture}, {grid}",
                hint=f"use --symmetric, or {plain}",
            )
        touched = _initialized_by_parent(facts.model_type)
        if layer := next((linear.name for linear in facts.linears if linear.name.rpartition(".")[2] in touched), None):
            raise UsageError(
                f"transformers cannot load packed weights into {facts.architecture}",
                where=f"while it loads, its code for {facts.model_type} writes to `{layer}.weight`, which is packed",
                hint=plain,
            )

    def export(self, model: ExportableModel, directory: Path, context: ExportContext) -> ExportResult:
        """Write shards, index, config.json and tokenizer files."""
        packs = self._packs(next(iter(model.quantized.values()), None))
        specs: dict[str, TensorSpec] = {}
        for name, (dtype, shape) in model.tensor_specs().items():
            layer = name.removesuffix(".weight")
            if packs and layer in model.quantized:
                specs.update(_packed_specs(layer, shape, dtype, model.quantized[layer]))
            else:
                specs[name] = TensorSpec(f"torch.{dtype}", shape)
        if packs:
            _check_names(model)
        limit = int(self.params.max_shard_gb * 10**9)
        with (
            ShardWriter(directory, specs, max_shard_bytes=limit) as writer,
            context.reporter.step("writing safetensors", len(model.tensor_specs())) as step,
        ):
            for name, value in model.tensors():
                if isinstance(value, QuantizedWeight) and packs:
                    for part, tensor in pack_weight(name, value).items():
                        writer.write(part, tensor)
                elif isinstance(value, QuantizedWeight):
                    writer.write(f"{name}.weight", model.read(f"{name}.weight"))
                else:
                    writer.write(name, value)
                step.advance(detail=name)
        changes = {"quantization_config": quantization_config(model)} if packs else None
        model.save_side_files(directory, config_changes=changes)
        return ExportResult()

    def weights_equal(self, model: ExportableModel, directory: Path) -> bool | None:
        """Unpack every quantized layer and compare codes, scales and zero points bit for bit."""
        if not self._packs(next(iter(model.quantized.values()), None)):
            return None
        seen: set[str] = set()
        for name, weight in read_packed(directory, model.quantized):
            if not _equal(weight, model.quantized_weight(name)):
                return False
            seen.add(name)
        return seen == set(model.quantized)

    def _packs(self, grid: Grid | None) -> bool:
        return grid is not None and self.params.format != "plain"


def pack_weight(layer: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors of one layer in the layout above."""
    import torch

    from .packing import pack_int32

    scale = weight.scale.reshape(1) if weight.grid.group_size == "tensor" else weight.scale
    parts = {
        f"{layer}.weight_packed": pack_int32(weight.codes, weight.bits),
        f"{layer}.weight_scale": scale,
        f"{layer}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        parts[f"{layer}.weight_zero_point"] = pack_int32(weight.zero_point.T, weight.bits).T.contiguous()
    return parts


def read_packed(directory: Path, grids: Mapping[str, Grid]) -> Iterator[tuple[str, QuantizedWeight]]:
    """Read layers back from the layout above.

    Args:
        directory: the artifact.
        grids: the layers to read and the grid of each.
    """
    from safetensors import safe_open

    from .packing import unpack_int32

    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118  (not a dict)
                layer = key.removesuffix(".weight_packed")
                if layer == key:
                    continue
                # A layer's parts may fall into neighbouring shards; those are looked up by the index.
                grid = grids[layer]
                out_features, in_features = _part(directory, shard, f"{layer}.weight_shape").tolist()
                scale = _part(directory, shard, f"{layer}.weight_scale")
                scale = scale.reshape(1, 1) if grid.group_size == "tensor" else scale
                zero = None
                if not grid.symmetric:
                    packed = _part(directory, shard, f"{layer}.weight_zero_point")
                    zero = unpack_int32(packed.T, grid.bits, out_features).T.contiguous()
                codes = unpack_int32(shard.get_tensor(key), grid.bits, in_features)
                yield layer, QuantizedWeight(codes=codes, scale=scale, zero_point=zero, grid=grid)


def _part(directory: Path, shard: Any, name: str) -> Tensor:
    import json

    from safetensors import safe_open

    if name in shard.keys():  # noqa: SIM118
        return shard.get_tensor(name)
    index = json.loads((directory / "model.safetensors.index.json").read_text(encoding="utf-8"))
    with safe_open(directory / index["weight_map"][name], framework="pt") as other:
        return other.get_tensor(name)


def quantization_config(model: ExportableModel) -> dict[str, Any]:
    """Return the `quantization_config` for config.json, with no more keys than readers need."""
    grids: dict[Grid, list[str]] = {}
    for name, grid in model.quantized.items():
        grids.setdefault(grid, []).append(name)
    groups: dict[str, Any] = {}
    modules = model.linear_modules()
    quantized = {module for module, layer in modules.items() if layer in model.quantized}
    for index, (grid, names) in enumerate(grids.items()):
        targets = ["Linear"] if len(grids) == 1 else sorted(names)
        groups[f"group_{index}"] = {"targets": targets, "weights": _weights_args(grid)}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(set(modules) - quantized),
    }


def _weights_args(grid: Grid) -> dict[str, Any]:
    strategy = grid.group_size if isinstance(grid.group_size, str) else "group"
    args: dict[str, Any] = {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "strategy": strategy}
    if isinstance(grid.group_size, int):
        args["group_size"] = grid.group_size
    return args


def _packed_specs(layer: str, shape: tuple[int, ...], dtype: str, grid: Grid) -> dict[str, TensorSpec]:
    out_features, in_features = shape
    groups = in_features // grid.group_width(in_features)
    scale = (1,) if grid.group_size == "tensor" else (out_features, groups)
    specs = {
        f"{layer}.weight_packed": TensorSpec("torch.int32", (out_features, -(-in_features * grid.bits // 32))),
        f"{layer}.weight_scale": TensorSpec(f"torch.{dtype}", scale),
        f"{layer}.weight_shape": TensorSpec("torch.int64", (2,)),
    }
    if not grid.symmetric:
        specs[f"{layer}.weight_zero_point"] = TensorSpec("torch.int32", (-(-out_features * grid.bits // 32), groups))
    return specs


def _initialized_by_parent(model_type: str) -> frozenset[str]:
    """Return the layers whose `weight` transformers' code for a model touches from the module above when it loads.

    Such code (T5, CLIP) stumbles over a layer that is packed and has no `weight`. Read from its source text: importing
    it would import torch.
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


def _check_names(model: ExportableModel) -> None:
    named = model.tensor_specs()
    for layer in model.quantized:
        if f"{layer}.weight" not in named:
            raise LlmoptError(
                f"compressed-tensors cannot hold `{layer}`",
                where="the checkpoint stores it as a slice of a 3-D tensor; readers take one matrix a layer",
                hint="use --export safetensors:format=plain, or --export onnx",
            )


def _equal(first: QuantizedWeight, second: QuantizedWeight) -> bool:
    zeros = (first.zero_point, second.zero_point)
    same_zero = zeros == (None, None) or (None not in zeros and bool((zeros[0] == zeros[1]).all()))  # type: ignore[union-attr]
    return (
        first.grid == second.grid and same_zero and first.codes.equal(second.codes) and first.scale.equal(second.scale)
    )
