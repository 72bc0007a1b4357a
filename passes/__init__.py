"""Passes: one file for each. passes/numerics/ holds the pure tensor mathematics."""

from __future__ import annotations

from typing import Any

from ..core.passes import Pass
from ..core.registry import Registry

PASSES: Registry[Pass[Any]] = Registry(
    "pass",
    __name__,
    {
        "allocate-bits": "allocate_bits:AllocateBits",
        "awq": "awq:Awq",
        "autoround": "autoround:Autoround",
        "cast": "cast:Cast",
        "fold-norms": "fold_norms:FoldNorms",
        "fuse": "fuse:Fuse",
        "gptq": "gptq:Gptq",
        "hqq": "hqq:Hqq",
        "quantize-activations": "quantize_activations:QuantizeActivations",
        "quantize-dynamic": "quantize_dynamic:QuantizeDynamic",
        "quantize-kv": "quantize_kv:QuantizeKv",
        "quantize-static": "quantize_static:QuantizeStatic",
        "remove-padding": "remove_padding:RemovePadding",
        "rotate": "rotate:Rotate",
        "rtn": "rtn:Rtn",
        "smooth": "smooth:Smooth",
    },
)
