"""Models with outlier channels: the same function, other weights.

    python benchmarks/outliers.py MODEL OUTPUT --kind norms|values|stream [--factor 50] [--every 32]

MODEL is a Llama folder with one file of weights. What is written computes what MODEL computes, but

    norms    every 32nd channel of a norm is 50 times as large, and the columns that read it are 1/50
    values   every 32nd row of the value layers is 50 times as large, and the columns of the output layer are 1/50
    stream   the residual stream is rotated to the principal axes of the embeddings, so that a few channels carry
             most of it, as they do in large models

"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from llmopt.core.exports import ExportContext
from llmopt.core.progress import Silent
from llmopt.core.recipe import ModelSpec
from llmopt.exporters.safetensors import Safetensors, SafetensorsParams
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.handle import TorchModel
from llmopt.models.locate import locate
from llmopt.models.outline import outline
from safetensors.torch import load_file, save_file
from torch import Tensor

KINDS = ("norms", "values", "stream")
FOLLOWERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def write_outliers(source: Path, output: Path, kind: str, *, factor: float = 50.0, every: int = 32) -> Path:
    """Write the model in `source` to `output` with outliers of a kind.

    Args:
        source: a Llama folder with model.safetensors.
        output: a folder that does not exist yet.
        kind: one of `KINDS`.
        factor: how much larger an outlier channel is; `stream` does not use it.
        every: distance of the channels; `stream` does not use it.
    """
    if kind == "stream":
        return _principal(source, output)
    shutil.copytree(source, output)
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        if kind == "norms":
            _scale_norms(tensors, prefix, layer, factor, every)
        else:
            _scale_values(tensors, prefix, config, factor, every)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return output


def _scale_norms(tensors: dict[str, Tensor], prefix: str, layer: int, factor: float, every: int) -> None:
    for index, (norm, followers) in enumerate(FOLLOWERS.items()):
        weight = tensors[f"{prefix}.{norm}.weight"]
        channels = torch.arange((5 * layer + 11 * index) % every, len(weight), every)
        weight[channels] *= factor
        for follower in followers:
            tensors[f"{prefix}.{follower}.weight"][:, channels] /= factor


def _scale_values(tensors: dict[str, Tensor], prefix: str, config: dict[str, int], factor: float, every: int) -> None:
    value, output = tensors[f"{prefix}.self_attn.v_proj.weight"], tensors[f"{prefix}.self_attn.o_proj.weight"]
    heads = config["num_key_value_heads"]
    scale = torch.ones(len(value))
    scale[::every] = factor
    repeated = scale.reshape(heads, -1).repeat_interleave(output.shape[1] // len(value), 0).reshape(-1)
    value *= scale.unsqueeze(1)
    output /= repeated


class PrincipalAxes:
    """The rotation to the principal axes of some rows, the largest first."""

    def __init__(self, rows: Tensor) -> None:
        _, axes = torch.linalg.eigh(rows.double().T @ rows.double())
        self._axes = axes.flip(1)

    @property
    def width(self) -> int:
        """Number of channels."""
        return len(self._axes)

    def turn(self, rows: Tensor) -> Tensor:
        """Return the rows in the new axes, float64."""
        return rows.double() @ self._axes


def _principal(source: Path, output: Path) -> Path:
    location = locate(ModelSpec(id=str(source)))
    checkpoint = Checkpoint(location.folder)
    table = checkpoint.read("model.embed_tokens.weight")
    output.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        model = TorchModel.create(location, checkpoint, outline(location, checkpoint), Path(scratch))
        turned, _ = model.rotate(lambda _: PrincipalAxes(table), None, seed=0, reporter=Silent())
        Safetensors(SafetensorsParams(format="plain")).export(turned, output, ExportContext())
    return output


def main() -> None:
    """Write one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--factor", type=float, default=50.0)
    parser.add_argument("--every", type=int, default=32)
    args = parser.parse_args()
    print(write_outliers(args.model, args.output, args.kind, factor=args.factor, every=args.every))


if __name__ == "__main__":
    main()
