"""Sample inputs for tracing, made from a model's config and the signature of its forward, without data."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

BATCH, SEQUENCE, PAST = 2, 3, 5
"""Sizes of the sample: all different and above 1, because the tracer takes equal sizes and 1 for constants."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Inputs of one forward pass, and which axes of each may vary at run time.

    Attributes:
        tensors: by the name of the parameter of `forward`.
        axes: for each, its varying axes by name: ``{"input_ids": {0: "batch", 1: "sequence"}}``.
    """

    tensors: dict[str, Tensor]
    axes: dict[str, dict[int, str]]


def accepted(model: Any) -> set[str]:
    """Return the names that the model's forward declares."""
    return set(inspect.signature(model.forward).parameters)


def sample_inputs(model: Any, *, past: int = 0) -> Sample:
    """Return one small batch for `model`, on its main input and everything that goes with it.

    Args:
        model: a transformers model.
        past: number of tokens of a text that a cache already holds.

    Raises:
        UsageError: the main input is of a kind this function does not know.
    """
    import torch

    kind = model.main_input_name
    tensors: dict[str, Tensor] = {}
    axes: dict[str, dict[int, str]] = {}
    if kind == "input_ids":
        _text(model, past, tensors, axes)
    elif kind == "pixel_values":
        tensors[kind] = torch.rand(BATCH, *_image_shape(model.config))
        axes[kind] = {0: "batch"}
    elif kind == "input_features":
        tensors[kind] = torch.rand(BATCH, *_spectrogram_shape(model))
        axes[kind] = {0: "batch"}
    elif kind == "input_values":
        tensors[kind] = torch.rand(BATCH, 4000)
        axes[kind] = {0: "batch", 1: "samples"}
    else:
        raise UsageError(
            f"cannot trace a model whose main input is `{kind}`",
            where=type(model).__name__,
            hint="models that take input_ids, pixel_values, input_features or input_values can be exported",
        )
    if model.config.is_encoder_decoder and "decoder_input_ids" in accepted(model):
        # Not the encoder's length: equal sizes would be taken for one axis.
        tensors["decoder_input_ids"] = _token_ids(model, (BATCH, SEQUENCE + 1))
        axes["decoder_input_ids"] = {0: "batch", 1: "decoder_sequence"}
    return Sample(tensors, axes)


def _text(model: Any, past: int, tensors: dict[str, Tensor], axes: dict[str, dict[int, str]]) -> None:
    import torch

    names = accepted(model)
    tensors["input_ids"] = _token_ids(model, (BATCH, SEQUENCE))
    axes["input_ids"] = {0: "batch", 1: "sequence"}
    if "attention_mask" in names:
        tensors["attention_mask"] = torch.ones(BATCH, past + SEQUENCE, dtype=torch.int64)
        axes["attention_mask"] = {0: "batch", 1: "total_sequence" if past else "sequence"}
    if "token_type_ids" in names and getattr(model.config, "type_vocab_size", 0) > 1 and not past:
        tensors["token_type_ids"] = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
        axes["token_type_ids"] = {0: "batch", 1: "sequence"}
    if "position_ids" in names and past:
        positions = torch.arange(past, past + SEQUENCE)
        tensors["position_ids"] = positions.unsqueeze(0).expand(BATCH, -1).contiguous()
        axes["position_ids"] = {0: "batch", 1: "sequence"}


def _token_ids(model: Any, shape: tuple[int, int]) -> Tensor:
    import torch

    # Never the padding token: models without a mask input count it to find positions (OPT, RoBERTa).
    vocabulary = model.config.get_text_config().vocab_size
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = torch.arange(shape[0] * shape[1]).reshape(shape) % (vocabulary - 1)
    return ids if padding is None else torch.where(ids == padding, vocabulary - 1, ids)


def _image_shape(config: Any) -> tuple[int, int, int]:
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width


def _spectrogram_shape(model: Any) -> tuple[int, int]:
    config = model.config
    if not hasattr(config, "num_mel_bins") or not hasattr(config, "max_source_positions"):
        raise UsageError(
            "cannot make a sample spectrogram",
            where=f"{type(model).__name__} has no num_mel_bins and max_source_positions",
            hint="Whisper and models with the same config can be exported",
        )
    # The convolutions in front of the encoder halve the length once (a stride of 2).
    return config.num_mel_bins, 2 * config.max_source_positions
