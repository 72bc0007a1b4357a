"""What vLLM's CPU build computes where activations are rounded, in torch.

Its kernels round in other ways than compressed-tensors' own simulation, which is what transformers and llmopt compute:

1. int8: a token's scale is its largest value / 127 (compressed-tensors: 127.5), and values are multiplied by the
   scale's reciprocal. Fixed scales are the artifact's.
2. int8 beside 4-bit weights: the operator is torch's `_dyn_quant_matmul_4bit`, which gives every token a zero point of
   its own (the artifact's word "symmetric" is not heeded), rounds halves away from zero, and wants the scales of groups
   in bfloat16.
3. e4m3: a token's scale is its largest value / 448, as in compressed-tensors.
4. Keys and values in e4m3: the bits behind the third are cut off, so every number moves toward zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llmopt.runtimes.transformers_ import load
from safetensors.torch import load_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Round = Callable[[Tensor], Tensor]
_NAME = "vllm_cpu"


def simulate(artifact: Path, *, noise: float = 0.0, seed: int = 0) -> Any:
    """Return a transformers model in float32 that rounds as vLLM's CPU build does.

    Args:
        artifact: a compressed-tensors folder with rounded inputs, or rounded keys and values.
        noise: the relative error that is added to what is about to be rounded: what other orders of summation give.
        seed: of that error.
    """
    tensors = {name: tensor for file in artifact.glob("*.safetensors") for name, tensor in load_file(file).items()}
    settings = json.loads((artifact / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    group = next(iter(settings["config_groups"].values()), {})
    model = _dequantized(artifact)
    disturb = _disturber(noise, seed)
    if group.get("input_activations"):
        _round_inputs(model, tensors, group, disturb)
    if settings.get("kv_cache_scheme"):
        _round_cache(model, tensors, disturb)
    return model


def _dequantized(artifact: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(artifact)
    delattr(config, "quantization_config")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = load(artifact).model.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict() if name in weights}, strict=False)
    model.tie_weights()
    return model.eval()


def _disturber(noise: float, seed: int) -> Round:
    generator = torch.Generator().manual_seed(seed)
    if not noise:
        return lambda values: values
    return lambda values: values * (1 + noise * torch.randn(values.shape, generator=generator))


def _round_inputs(model: Any, tensors: Tensors, group: dict[str, Any], disturb: Round) -> None:
    bits, kind = group["weights"]["num_bits"], group["input_activations"]["type"]
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or f"{name}.weight_scale" not in tensors:
            continue
        if kind == "float":
            rounding = _fp8(tensors.get(f"{name}.input_scale"))
        elif bits == 4:
            rounding = asymmetric_inputs
            module.weight.data = _with_bfloat16_scales(tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"])
        else:
            rounding = _int8(tensors.get(f"{name}.input_scale"), tensors.get(f"{name}.input_zero_point"))
        module.register_forward_pre_hook(lambda _, given, rounding=rounding: (rounding(disturb(given[0])),))


def _with_bfloat16_scales(codes: Tensor, scales: Tensor) -> Tensor:
    grouped = codes.float().reshape(*scales.shape, -1)
    return (grouped * scales.bfloat16().float().unsqueeze(-1)).reshape(codes.shape)


def _int8(scale: Tensor | None, zero_point: Tensor | None) -> Round:
    def rounded(values: Tensor) -> Tensor:
        step = values.abs().amax(-1, keepdim=True) / 127 if scale is None else scale.float()
        zero = 0.0 if zero_point is None else zero_point.float()
        codes = (values * step.double().reciprocal().float() + zero).clamp(-128, 127).round()
        return (codes - zero) * step

    return rounded


def asymmetric_inputs(values: Tensor) -> Tensor:
    """Round each token to 8 bits with a zero point, as torch's `_dyn_quant_matmul_4bit` does."""
    low, high = values.amin(-1, keepdim=True).clamp_max(0), values.amax(-1, keepdim=True).clamp_min(0)
    per_step = torch.where(low == high, 1.0, 255 / (high - low))
    zero = (-128 - low * per_step).clamp(-128, 127).round()
    scaled = values * per_step
    codes = (scaled.sign() * (scaled.abs() + 0.5).floor() + zero).clamp(-128, 127)
    return (codes - zero) / per_step


def _fp8(fixed: Tensor | None) -> Round:
    def rounded(values: Tensor) -> Tensor:
        largest = values.abs().amax(-1, keepdim=True)
        scale = (largest / 448).clamp_min(1 / (448 * 512)) if fixed is None else fixed.float()
        return (values * scale.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    return rounded


def fp8_cache(values: Tensor, scale: Tensor) -> Tensor:
    """Return what the cache gives back: e4m3, with what lies behind the third bit cut off."""
    # Times 2^-120 the exponents of float32 are those of e4m3, subnormal numbers included.
    bits = (values.float() * scale.reciprocal()).clamp(-448, 448).mul(2.0**-120).view(torch.int32)
    return (bits & ~0xFFFFF).view(torch.float32) * 2.0**120 * scale


def _round_cache(model: Any, tensors: Tensors, disturb: Round) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    scales = {
        module: [tensors[f"{name}.{part}_scale"].float() for part in "kv"]
        for name, module in model.named_modules()
        if f"{name}.k_scale" in tensors
    }

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        key, value = (fp8_cache(disturb(part), scale) for part, scale in zip((key, value), scales[module], strict=True))
        return sdpa_attention_forward(module, query, key, value, *args, **options)

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
