"""A model in memory that implements `core.exports.ExportableModel`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llmopt.core.facts import LinearFacts, ModelFacts
from llmopt.core.quantized import Grid, QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch


def round_to_nearest(weight: torch.Tensor, grid: Grid, dtype: Any = None) -> QuantizedWeight:
    """Quantize (out, in) by rounding to the nearest code."""
    import torch

    dtype = dtype or torch.float32
    rows, columns = weight.shape
    width = grid.group_width(columns)
    groups = weight.float().reshape(rows, columns // width, width)
    if grid.group_size == "tensor":
        groups = groups.reshape(1, 1, -1)
    if grid.symmetric:
        scale = (groups.abs().amax(-1) / (grid.midpoint - 0.5)).clamp_min(1e-8).to(dtype)
        zero = torch.full_like(scale, grid.midpoint).float()
    else:
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scale = ((high - low) / (grid.levels - 1)).clamp_min(1e-8).to(dtype)
        zero = (-low / scale.float()).round().clamp(0, grid.levels - 1)
    codes = (groups / scale.float().unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, grid.levels - 1)
    codes = codes.to(torch.uint8).reshape(rows, columns)
    return QuantizedWeight(codes, scale, None if grid.symmetric else zero.to(torch.uint8), grid)


class StandIn:
    """An exportable model over a transformers model in memory; quantized layers are rounded to the nearest."""

    def __init__(self, model: Any, grids: Mapping[str, Grid] | None = None, tokenizer: Any = None) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.weights = {}
        for name, grid in (grids or {}).items():
            matrix = matrix_of(model, name)
            self.weights[name] = round_to_nearest(matrix, grid, matrix.dtype)
            matrix.copy_(self.weights[name].dequantize())

    @property
    def facts(self) -> ModelFacts:
        config = json.loads(self.model.config.to_json_string(use_diff=False))
        parameters = sum(value.numel() for value in self.model.parameters())
        linears = tuple(LinearFacts(name=n, out_features=o, in_features=i) for n, (o, i) in linears_of(self.model))
        return ModelFacts(
            source="memory",
            model_type=self.model.config.model_type,
            architecture=type(self.model).__name__,
            dtype=str(self.model.dtype).removeprefix("torch."),
            parameters=parameters,
            bytes=4 * parameters,
            largest_block_bytes=0,
            outside_bytes=0,
            blocks=2,
            linears=linears,
            has_tokenizer=self.tokenizer is not None,
            config=config,
        )

    def cast(self, dtype: str) -> StandIn:
        raise NotImplementedError

    def tensors(self) -> Iterator[tuple[str, torch.Tensor | QuantizedWeight]]:
        raise NotImplementedError

    @property
    def quantized(self) -> Mapping[str, Grid]:
        return {name: weight.grid for name, weight in self.weights.items()}

    def quantized_weight(self, name: str) -> QuantizedWeight:
        return self.weights[name]

    def materialize(self, dtype: str = "float32") -> Any:
        import torch

        return self.model.to(getattr(torch, dtype))

    def save_side_files(self, directory: Path, *, config_changes: Mapping[str, Any] | None = None) -> None:
        config = self.model.config.to_dict() | {"architectures": [type(self.model).__name__]} | (config_changes or {})
        (directory / "config.json").write_text(json.dumps(config, default=str, indent=2))
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(directory)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)


def matrix_of(model: Any, name: str) -> torch.Tensor:
    """Return the weight of a layer as (out, in), a view; `….experts.gate_up_proj.1` is one of a stack."""
    if name.rpartition(".")[2].isdigit():
        stack, _, place = name.rpartition(".")
        return model.get_parameter(stack).data[int(place)]
    weight = model.get_parameter(f"{name}.weight").data
    return weight.T if is_transposed(model.get_submodule(name)) else weight


def is_transposed(module: Any) -> bool:
    return type(module).__name__ == "Conv1D"


def linears_of(model: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield (name, (out, in)) of the linear layers inside repeated blocks."""
    import torch

    for name, module in model.named_modules():
        if any(part.isdigit() for part in name.split(".")):
            if isinstance(module, torch.nn.Linear):
                yield name, (module.out_features, module.in_features)
            elif is_transposed(module):
                yield name, (module.weight.shape[1], module.weight.shape[0])


def quantized_standin(model: Any, grid: Grid, tokenizer: Any = None) -> StandIn:
    return StandIn(model, {name: grid for name, (_, width) in linears_of(model) if grid.divides(width)}, tokenizer)


def word_tokenizer() -> Any:
    """Return a tokenizer of whole words, made without files."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {word: place for place, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *map(str, range(4, 272))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
