"""What is known of a model without opening a tensor: from config.json and the headers of its shards."""

from __future__ import annotations

from typing import Any

import msgspec


class LinearFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A linear layer inside one of the repeated blocks.

    Attributes:
        name: the checkpoint's name of its weight, without `.weight`.
        out_features: rows of the weight as (out, in), whatever way the checkpoint stores it.
        in_features: columns.
        transposed: the checkpoint stores (in, out), as GPT-2's Conv1D does.
    """

    name: str
    out_features: int
    in_features: int
    transposed: bool = False


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A model's outline.

    Attributes:
        source: the folder or hub id as the user wrote it.
        model_type: `model_type` of config.json.
        architecture: first entry of `architectures`, or "".
        dtype: the dtype that holds most of the weights, as torch names it ("float32").
        parameters: number of weights stored.
        bytes: bytes of the weights stored.
        largest_block_bytes: bytes of the largest of the repeated blocks.
        outside_bytes: bytes of everything outside the blocks (embeddings, final norm, head).
        blocks: number of repeated blocks, over all stacks.
        linears: linear layers inside the blocks.
        biased_norms: norms inside the blocks that have a bias: as a rule LayerNorms, which subtract the mean.
        has_tokenizer: whether a tokenizer lies beside the weights.
        config: config.json.
        has_fast_tokenizer: whether it is a tokenizer.json.
    """

    source: str
    model_type: str
    architecture: str
    dtype: str
    parameters: int
    bytes: int
    largest_block_bytes: int
    outside_bytes: int
    blocks: int
    linears: tuple[LinearFacts, ...]
    has_tokenizer: bool
    config: dict[str, Any]
    biased_norms: tuple[str, ...] = ()
    has_fast_tokenizer: bool = False

    @property
    def is_causal_lm(self) -> bool:
        """Whether the architecture generates text token by token from a prompt alone."""
        return self.architecture.endswith(("ForCausalLM", "LMHeadModel"))

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model has an encoder and a decoder; a class may take the encoder alone (T5EncoderModel)."""
        return bool(self.config.get("is_encoder_decoder")) and not self.architecture.endswith("EncoderModel")
