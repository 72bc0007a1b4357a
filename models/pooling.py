"""Pooling as part of a model's forward: beside the states of the tokens it returns one embedding for each text.

In plain tensor operations on states and mask, so that a tracer sees nothing special. Only real tokens count, wherever
the padding stands. Reimers and Gurevych 2019, "Sentence-BERT"; Muennighoff 2022, "SGPT" (weighted mean).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..core.errors import LlmoptError
from .checkpoint import Checkpoint
from .sentence import Dense, Sentence

_SMALL = 1e-9
_MASKED = -1e9


@dataclass
class SentenceOutput(ModelOutput):
    """What a model that pools returns.

    Attributes:
        last_hidden_state: the states of the tokens, (batch, sequence, hidden).
        sentence_embedding: (batch, embedding).
    """

    last_hidden_state: Tensor | None = None
    sentence_embedding: Tensor | None = None


def pool_sentences(model: PreTrainedModel, sentence: Sentence) -> None:
    """Let a model return the embeddings of its texts.

    A pooler of its own, which was trained for other things, is no longer computed.

    Raises:
        LlmoptError: the weights of a dense layer are damaged.
    """
    drop_pooler(model)
    layers = [_load(dense) for dense in sentence.dense]
    forward = model.forward

    @wraps(forward)
    def pooled(input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **others: Any) -> SentenceOutput:
        made = forward(input_ids=input_ids, attention_mask=attention_mask, **{**others, "return_dict": True})
        states = made.last_hidden_state
        mask = torch.ones(states.shape[:2]) if attention_mask is None else attention_mask
        embedding = torch.cat([WAYS[way](states, mask.to(states.dtype)) for way in sentence.pooling], dim=-1)
        for layer in layers:
            embedding = layer(embedding)
        if sentence.normalize:
            embedding = embedding / embedding.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
        return SentenceOutput(states, embedding)

    model.forward = pooled


def drop_pooler(model: PreTrainedModel) -> None:
    """Take away the pooler of a base model, which then returns hidden states alone."""
    if isinstance(getattr(model, "pooler", None), nn.Module):
        setattr(model, "pooler", None)  # noqa: B010  (pyright knows no attribute that may be None)


def _first(states: Tensor, mask: Tensor) -> Tensor:
    """The first token of each text (CLS)."""
    return _weighted(states, mask * (mask.cumsum(1) == 1))


def _largest(states: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.unsqueeze(-1) > 0, states, _MASKED).amax(1)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    return _weighted(states, mask) / mask.sum(1, keepdim=True).clamp(min=_SMALL)


def _mean_sqrt(states: Tensor, mask: Tensor) -> Tensor:
    return _weighted(states, mask) / mask.sum(1, keepdim=True).clamp(min=_SMALL).sqrt()


def _weighted_mean(states: Tensor, mask: Tensor) -> Tensor:
    """The n-th token counts n times: it has read n tokens."""
    return _mean(states, mask * mask.cumsum(1))


def _last(states: Tensor, mask: Tensor) -> Tensor:
    counted = mask.cumsum(1)
    return _weighted(states, mask * (counted == mask.sum(1, keepdim=True)))


def _weighted(states: Tensor, weights: Tensor) -> Tensor:
    return (states * weights.unsqueeze(-1)).sum(1)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
"""By name: states (batch, sequence, hidden) and mask (batch, sequence), both float, to (batch, hidden)."""


def _load(dense: Dense) -> Callable[[Tensor], Tensor]:
    """Return a dense layer; its weights are the function's own, no parameters of the model."""
    checkpoint = Checkpoint(dense.folder)
    if "linear.weight" not in checkpoint:
        raise LlmoptError(
            "weight `linear.weight` is missing", where=str(dense.folder), hint="fetch the dense layer again"
        )
    weight = checkpoint.read("linear.weight").float()
    bias = checkpoint.read("linear.bias").float() if "linear.bias" in checkpoint else None
    activation: Callable[[Tensor], Tensor] = getattr(nn, dense.activation)()

    def layer(embedding: Tensor) -> Tensor:
        return activation(nn.functional.linear(embedding, weight, bias))

    return layer
