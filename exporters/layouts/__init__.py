"""Ways to store quantized weights in a Hugging Face checkpoint: one file for each, all packing the same codes."""

from __future__ import annotations

from ...core.registry import Registry
from .layout import Layout

LAYOUTS: Registry[Layout] = Registry(
    "layout",
    __name__,
    {
        "compressed-tensors": "compressed_tensors:CompressedTensors",
        "gptq": "gptq:Gptq",
        "gptq_v2": "gptq:GptqV2",
        "awq": "awq:Awq",
    },
)
