"""LoRA adapters (Hu et al., 2021) in the layout of PEFT: a folder of two files, loaded beside a base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FOLDER = "adapter"
"""Where an artifact keeps the adapter that belongs to it."""

PREFIX = "base_model.model."
DOWN, UP = "lora_A.weight", "lora_B.weight"


class AdapterShape(NamedTuple):
    """What a pass says of the adapter that it will leave, before the work.

    Attributes:
        rank: of every product.
        targets: the layers that get one, by the end of their name; all where none is named.
    """

    rank: int
    targets: tuple[str, ...]

    def covers(self, layer: str) -> bool:
        """Return whether the adapter changes a layer, as PEFT reads names."""
        return not self.targets or any(f".{layer}".endswith(f".{target}") for target in self.targets)

    def __str__(self) -> str:
        """Return it in words."""
        return f"rank {self.rank} over {', '.join(sorted(self.targets)) or 'all layers'}"


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """What layers add to their outputs while their weights stay as they are: `alpha / rank * up @ down @ input`.

    Attributes:
        file: safetensors with `down`, (rank, in_features), and `up`, (out_features, rank), float32, under PEFT's names.
        layers: paths of the modules that have it.
        rank: of every product `up @ down`.
        alpha: its scale times the rank.
        transposed: whether some of the modules hold their weight as (in_features, out_features).
    """

    file: str
    layers: tuple[str, ...]
    rank: int
    alpha: int
    transposed: bool

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank

    def config(self) -> dict[str, Any]:
        """Return adapter_config.json; it names no base, which is not the model of any hub but lies beside it."""
        return peft_config(self.layers, rank=self.rank, alpha=self.alpha, transposed=self.transposed, base=None)


def names(layer: str) -> tuple[str, str]:
    """Return what PEFT calls the tensors `down` and `up` of a layer."""
    return f"{PREFIX}{layer}.{DOWN}", f"{PREFIX}{layer}.{UP}"


def peft_config(layers: Sequence[str], *, rank: int, alpha: int, transposed: bool, base: str | None) -> dict[str, Any]:
    """Return adapter_config.json.

    Args:
        layers: paths of modules.
        rank: of the adapter.
        alpha: its scale times the rank.
        transposed: whether some of the modules hold their weight as (in_features, out_features).
        base: what it was made for, None where that has no name of its own.
    """
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(layers),
        "task_type": None,
    }
