"""A model with outlier channels: the same function, but a few channels of every norm are 50 times as large."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FOLLOWERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def save_with_outliers(source: Path, folder: Path, *, factor: float = 50.0, every: int = 32) -> Path:
    """Write the Llama in `source`, one file of weights, into `folder` with outliers in every `every`-th channel.

    Args:
        source: a folder with model.safetensors.
        folder: where to write it.
        factor: what the channels of the norms are multiplied by, and the columns that read them divided by.
        every: distance of the channels.
    """
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    layers = json.loads((source / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    for layer in range(layers):
        for index, (norm, followers) in enumerate(FOLLOWERS.items()):
            weight = tensors[f"model.layers.{layer}.{norm}.weight"]
            channels = torch.arange((5 * layer + 11 * index) % every, len(weight), every)
            weight[channels] *= factor
            for follower in followers:
                tensors[f"model.layers.{layer}.{follower}.weight"][:, channels] /= factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
