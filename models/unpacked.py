"""An artifact of ours, its weights unpacked one by one by the library that its readers use.

For a model too large to be opened whole: the modules are transformers', the unpacking is compressed-tensors', and only
the order is ours, block after block.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import LlmoptError
from .checkpoint import Checkpoint

_PARTS = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_global_scale",
)


def unpacking_reader(directory: Path) -> Callable[[str], Tensor]:
    """Return a function that gives the tensors of a folder by their names before packing.

    Raises:
        LlmoptError: the folder's config.json and tensors do not fit together.
    """
    checkpoint = Checkpoint(directory)
    schemes = _schemes(json.loads((directory / "config.json").read_text(encoding="utf-8")))

    def read(name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        if f"{layer}.weight_scale" not in checkpoint:
            if name not in checkpoint:
                raise LlmoptError(f"weight `{name}` is missing from the artifact", where=str(directory))
            return checkpoint.read(name)
        from compressed_tensors.compressors import BaseCompressor

        parts: dict[str, Tensor | None] = {
            part: checkpoint.read(f"{layer}.{part}") for part in _PARTS if f"{layer}.{part}" in checkpoint
        }
        scheme = schemes.get(layer) or schemes["Linear"]
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        weight: Any = compressor.decompress(parts, scheme)["weight"]
        return weight.to(torch.float32)

    return read


def _schemes(config: dict[str, Any]) -> dict[str, Any]:
    """Return the scheme of each target (a layer's name, or "Linear") as compressed-tensors reads it."""
    from compressed_tensors.quantization import QuantizationScheme

    quantization = config.get("quantization_config") or {}
    groups = quantization.get("config_groups", {})
    return {
        target: QuantizationScheme(**{"format": quantization["format"]} | group)
        for group in groups.values()
        for target in group["targets"]
    }
