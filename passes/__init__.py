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
        "autoround": "autoround:Autoround",
        "awq": "awq:Awq",
        "cast": "cast:Cast",
        "cast-fp16": "cast_fp16:CastFp16",
        "convert-opset": "convert_opset:ConvertOpset",
        "distill": "distill:Distill",
        "extract-adapter": "extract_adapter:ExtractAdapter",
        "fix-shapes": "fix_shapes:FixShapes",
        "fold": "fold:Fold",
        "fold-norms": "fold_norms:FoldNorms",
        "fuse": "fuse:Fuse",
        "gptq": "gptq:Gptq",
        "hqq": "hqq:Hqq",
        "merge-adapter": "merge_adapter:MergeAdapter",
        "prune-depth": "prune_depth:PruneDepth",
        "prune-vocab": "prune_vocab:PruneVocab",
        "prune-width": "prune_width:PruneWidth",
        "quantize-activations": "quantize_activations:QuantizeActivations",
        "quantize-dynamic": "quantize_dynamic:QuantizeDynamic",
        "quantize-kv": "quantize_kv:QuantizeKv",
        "quantize-static": "quantize_static:QuantizeStatic",
        "quantize-weights": "quantize_weights:QuantizeWeights",
        "remove-padding": "remove_padding:RemovePadding",
        "rotate": "rotate:Rotate",
        "rtn": "rtn:Rtn",
        "simplify": "simplify:Simplify",
        "smooth": "smooth:Smooth",
        "sparsify": "sparsify:Sparsify",
    },
)
