"""compressed-tensors (https://github.com/vllm-project/compressed-tensors).

For a layer `L`, by format:

1. `pack-quantized`, integers: `L.weight_packed` int32 [out, ceil(in * bits / 32)], unsigned codes as a dense stream of
   bits, lowest first; `L.weight_shape` int64 [2]: [out, in]; `L.weight_zero_point`, asymmetric only: unsigned, packed
   like the codes but along the first axis, int32 [ceil(out * bits / 32), groups].
2. `int-quantized`, symmetric integers where inputs are int8 too: `L.weight` int8 [out, in], codes less 2^(bits - 1).
3. `float-quantized`: `L.weight` float8_e4m3fn [out, in].
4. `nvfp4-pack-quantized`: `L.weight_packed` uint8 [out, in / 2], the first of two codes in the low half;
   `L.weight_scale` float8_e4m3fn [out, in / 16]; `L.weight_global_scale` float32 [1], which scales are divided by.
5. `mxfp4-pack-quantized`: as nvfp4, `L.weight_scale` uint8 [out, in / 32], 127 more than the exponent of two.

`L.weight_scale` of 1 to 3 has the model's dtype: [out, groups], [1] per tensor, [out / 128, in / 128] per block. Inputs
with a fixed scale add `L.input_scale` [1] in the model's dtype, and `L.input_zero_point` int8 [1] if asymmetric. The
scales of keys and values are `A.k_scale` and `A.v_scale` [1] for an attention module `A`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.activations import ActivationGrid, ActivationNumber, QuantizedInput
from ...core.errors import UsageError
from ...core.exports import ExportableModel
from ...core.facts import ModelFacts
from ...core.quantized import BLOCK, Grid, QuantizedWeight
from ..shards import TensorSpec
from .layout import PLAIN, Layout, conv1d_refusal, unpacked_modules

if TYPE_CHECKING:
    from torch import Tensor

_E8M0_BIAS = 127
_SCALE_DTYPES = {"nvfp4": "torch.float8_e4m3fn", "mxfp4": "torch.uint8"}
_OTHERWISE = f"use {PLAIN} or --export onnx"


class CompressedTensors(Layout):
    """Any bits, any group size; transformers and vLLM load it."""

    name = "compressed-tensors"

    def refusal(self, facts: ModelFacts, grid: Grid) -> UsageError | None:
        """Refuse what the format has no place for, and what transformers does not load."""
        if refused := conv1d_refusal(self.name, facts):
            return refused
        if grid.number == "fp8" and isinstance(grid.group_size, int):
            return UsageError(
                "no reader of compressed-tensors knows fp8 weights in groups",
                where=str(grid),
                hint="use --group-size channel or block",
            )
        if grid.number in ("nvfp4", "mxfp4") and facts.dtype != "bfloat16":
            return UsageError(
                f"compressed-tensors unpacks {grid} weights to bfloat16",
                where=f"the model is {facts.dtype}, and the weights would no longer be those quantized",
                hint="store it in bfloat16 first: --dtype bfloat16, or `- cast: {dtype: bfloat16}` in the recipe",
            )
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

    def activations_refusal(
        self, grids: Collection[Grid], inputs: ActivationGrid | None, cache: ActivationNumber | None
    ) -> UsageError | None:
        """Refuse what no engine multiplies; the format has words for all."""
        del cache
        if inputs is not None and any(not grid.symmetric for grid in grids):
            return UsageError(
                "no engine multiplies 8-bit inputs with asymmetric weights",
                where=f"inputs {inputs}",
                hint="use --symmetric, or a scheme with 16-bit activations",
            )
        if inputs is not None and any(grid.number in ("nvfp4", "mxfp4") for grid in grids):
            return UsageError(
                "no engine multiplies 8-bit inputs with 4-bit floating-point weights",
                where=f"inputs {inputs}",
                hint="leave the inputs in floating point, or use integer or fp8 weights",
            )
        return None

    def specs(
        self, shape: tuple[int, ...], dtype: str, grid: Grid, inputs: QuantizedInput | None = None
    ) -> dict[str, TensorSpec]:
        """Return the parts of a layer."""
        out_features, in_features = shape
        rows, groups = grid.scale_shape(out_features, in_features)
        scale = TensorSpec(f"torch.{dtype}", (1,) if grid.group_size == "tensor" else (rows, groups))
        zero = None
        match format_of(grid, inputs):
            case "pack-quantized":
                specs = {
                    "weight_packed": TensorSpec("torch.int32", (out_features, -(-in_features * grid.bits // 32))),
                    "weight_shape": TensorSpec("torch.int64", (2,)),
                }
                zero = TensorSpec("torch.int32", (-(-out_features * grid.bits // 32), groups))
            case "int-quantized":
                specs = {"weight": TensorSpec("torch.int8", (out_features, in_features))}
            case "float-quantized":
                specs = {"weight": TensorSpec("torch.float8_e4m3fn", (out_features, in_features))}
            case _:
                specs = {"weight_packed": TensorSpec("torch.uint8", (out_features, in_features // 2))}
                scale = TensorSpec("torch.uint8" if grid.number == "mxfp4" else "torch.float8_e4m3fn", (rows, groups))
                if grid.number == "nvfp4":
                    specs["weight_global_scale"] = TensorSpec("torch.float32", (1,))
        specs["weight_scale"] = scale
        if not grid.symmetric and zero is not None:
            specs["weight_zero_point"] = zero
        if inputs is not None and inputs.scale is not None:
            specs["input_scale"] = TensorSpec(f"torch.{dtype}", (1,))
            if not inputs.grid.symmetric:
                specs["input_zero_point"] = TensorSpec("torch.int8", (1,))
        return specs

    def pack(self, weight: QuantizedWeight, inputs: QuantizedInput | None = None) -> dict[str, Tensor]:
        """Return the tensors of a layer."""
        import torch

        scale = weight.scale.reshape(1) if weight.grid.group_size == "tensor" else weight.scale
        parts = _PACKERS[format_of(weight.grid, inputs)](weight) | {"weight_scale": scale}
        if weight.grid.number == "nvfp4":
            assert weight.divisor is not None
            parts |= {"weight_scale": scale.to(torch.float8_e4m3fn), "weight_global_scale": weight.divisor}
        elif weight.grid.number == "mxfp4":
            parts["weight_scale"] = (scale.float().frexp().exponent + (_E8M0_BIAS - 1)).to(torch.uint8)
        return parts

    def input_parts(self, inputs: QuantizedInput | None, dtype: str) -> dict[str, Tensor]:
        """Return the fixed scale of a layer's input."""
        if inputs is None or inputs.scale is None:
            return {}
        import torch

        parts = {"input_scale": torch.tensor([inputs.scale], dtype=getattr(torch, dtype))}
        if not inputs.grid.symmetric:
            parts["input_zero_point"] = torch.tensor([inputs.zero_point], dtype=torch.int8)
        return parts

    def unpack(self, parts: Mapping[str, Tensor], grid: Grid, dtype: str) -> QuantizedWeight:
        """Return the weight that the parts hold."""
        codes, zero = _unpacked(parts, grid)
        stored = parts["weight_scale"]
        scale = stored.reshape(1, 1) if grid.group_size == "tensor" else stored
        if grid.number in ("nvfp4", "mxfp4"):
            import torch

            wide = stored.float() if grid.number == "nvfp4" else torch.exp2(stored.float() - _E8M0_BIAS)
            scale = wide.to(getattr(torch, dtype))
        divisor = parts["weight_global_scale"] if grid.number == "nvfp4" else None
        return QuantizedWeight(codes=codes, scale=scale, zero_point=zero, grid=grid, divisor=divisor)

    def others(self, model: ExportableModel) -> dict[str, Tensor]:
        """Return the scales of keys and values."""
        import torch

        dtype = getattr(torch, model.facts.dtype)
        return {
            f"{attention}.{name}": torch.tensor([scale], dtype=dtype)
            for attention, cache in model.caches.items()
            for name, scale in (("k_scale", cache.key_scale), ("v_scale", cache.value_scale))
        }

    def config(self, model: ExportableModel) -> dict[str, Any]:
        """Return the `quantization_config`: one group of layers for every grid and rounding of inputs."""
        schemes: dict[tuple[Grid, ActivationGrid | None], list[str]] = {}
        for name, grid in model.quantized.items():
            inputs = model.inputs.get(name)
            schemes.setdefault((grid, None if inputs is None else inputs.grid), []).append(name)
        formats = {scheme: format_of(scheme[0], scheme[1]) for scheme in schemes}
        several = len(set(formats.values())) > 1
        # compressed-tensors guesses the format of layers with rounded inputs, and not always right.
        told = several or any(inputs is not None for _, inputs in schemes)
        groups: dict[str, Any] = {}
        for index, ((grid, inputs), names) in enumerate(schemes.items()):
            groups[f"group_{index}"] = {
                "targets": ["Linear"] if len(schemes) == 1 else sorted(names),
                "weights": weights_args(grid),
                **({} if inputs is None else {"input_activations": inputs_args(inputs)}),
                **({"format": formats[grid, inputs]} if told else {}),
            }
        config = {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision" if several else next(iter(formats.values()), "dense"),
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": unpacked_modules(model),
        }
        if model.caches:
            config["kv_cache_scheme"] = _cache_args(next(iter(model.caches.values())).number)
        grids = [grid for grid, _ in schemes]
        return config | ({"dequantize": True} if _must_dequantize(model, grids) else {})

    def notes(self, model: ExportableModel) -> list[str]:
        """Say what engines do not do with the artifact."""
        made: list[str] = []
        if any(cache.number == "int8" for cache in model.caches.values()):
            made.append("vLLM reads scales of keys and values in fp8 only, not int8")
        if any(_loses_scales(model, name, inputs) for name, inputs in model.inputs.items()):
            made.append(
                "vLLM's CPU build rounds the scales of 4-bit groups beside int8 inputs to bfloat16: `cast` the model "
                "to it first, and nothing is lost"
            )
        return made


def _loses_scales(model: ExportableModel, layer: str, inputs: QuantizedInput) -> bool:
    grid, dtype = model.quantized[layer], model.tensor_specs()[f"{layer}.weight"][0]
    grouped = grid.number == "int" and grid.bits == 4 and isinstance(grid.group_size, int)
    return grouped and inputs.grid.number == "int8" and dtype != "bfloat16"


def format_of(grid: Grid, inputs: QuantizedInput | ActivationGrid | None) -> str:
    """Return the format that a layer is stored in."""
    rounding = inputs.grid if isinstance(inputs, QuantizedInput) else inputs
    if grid.number != "int":
        return "float-quantized" if grid.number == "fp8" else f"{grid.number}-pack-quantized"
    # Engines read the weights of their int8 kernels unpacked.
    return "int-quantized" if rounding is not None and rounding.number == "int8" else "pack-quantized"


def weights_args(grid: Grid) -> dict[str, Any]:
    """Return compressed-tensors' description of a grid."""
    strategy = grid.group_size if isinstance(grid.group_size, str) else "group"
    args: dict[str, Any] = {
        "num_bits": grid.bits,
        "type": "int" if grid.number == "int" else "float",
        "symmetric": grid.symmetric,
        "strategy": "tensor_group" if grid.number == "nvfp4" else strategy,
    }
    if isinstance(grid.group_size, int):
        args["group_size"] = grid.group_size
    if grid.group_size == "block":
        args["block_structure"] = [BLOCK, BLOCK]
    if grid.number in _SCALE_DTYPES:
        args["scale_dtype"] = _SCALE_DTYPES[grid.number]
    return args


def inputs_args(inputs: ActivationGrid) -> dict[str, Any]:
    """Return compressed-tensors' description of how inputs are rounded."""
    return {
        "num_bits": 8,
        "type": "int" if inputs.number == "int8" else "float",
        "symmetric": inputs.symmetric,
        "strategy": inputs.scale,
        "dynamic": inputs.scale == "token",
    }


def _cache_args(number: ActivationNumber) -> dict[str, Any]:
    return inputs_args(ActivationGrid(number=number, scale="tensor"))


def _pack_integers(weight: QuantizedWeight) -> dict[str, Tensor]:
    import torch

    from ..packing import pack_int32

    parts = {
        "weight_packed": pack_int32(weight.codes, weight.bits),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        parts["weight_zero_point"] = pack_int32(weight.zero_point.T, weight.bits).T.contiguous()
    return parts


def _signed_integers(weight: QuantizedWeight) -> dict[str, Tensor]:
    import torch

    return {"weight": (weight.codes.short() - weight.grid.midpoint).to(torch.int8)}


def _bytes_of_fp8(weight: QuantizedWeight) -> dict[str, Tensor]:
    import torch

    return {"weight": weight.codes.view(torch.float8_e4m3fn)}


def _pack_pairs(weight: QuantizedWeight) -> dict[str, Tensor]:
    return {"weight_packed": weight.codes[:, ::2] | (weight.codes[:, 1::2] << 4)}


_PACKERS: Mapping[str, Callable[[QuantizedWeight], dict[str, Tensor]]] = {
    "pack-quantized": _pack_integers,
    "int-quantized": _signed_integers,
    "float-quantized": _bytes_of_fp8,
    "nvfp4-pack-quantized": _pack_pairs,
    "mxfp4-pack-quantized": _pack_pairs,
}


def _unpacked(parts: Mapping[str, Tensor], grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Return codes and zero points."""
    import torch

    if "weight_shape" in parts:
        from ..packing import unpack_int32

        out_features, in_features = parts["weight_shape"].tolist()
        codes = unpack_int32(parts["weight_packed"], grid.bits, in_features)
        if grid.symmetric:
            return codes, None
        return codes, unpack_int32(parts["weight_zero_point"].T, grid.bits, out_features).T.contiguous()
    if "weight_packed" in parts:
        pairs = parts["weight_packed"]
        return torch.stack((pairs & 0xF, pairs >> 4), -1).flatten(1), None
    if grid.number == "fp8":
        return parts["weight"].view(torch.uint8), None
    return (parts["weight"].short() + grid.midpoint).to(torch.uint8), None


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
