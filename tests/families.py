"""Tiny random models of many families, saved as the folders that users have."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# A vocabulary unlike any layer's width: GenAI's builder takes a layer as wide as the vocabulary for the head.
VOCABULARY = 272
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **_SPECIAL,
}
_ENCODER = {key: value for key, value in _DECODER.items() if key != "num_key_value_heads"}
_WINDOW = {"head_dim": 16, "sliding_window": 8}


@dataclass(frozen=True, slots=True)
class Family:
    """How to make a tiny model.

    Attributes:
        title: what people call it.
        architecture: the transformers class.
        config: `model_type` and what differs from its defaults.
        text: whether it reads token ids.
    """

    title: str
    architecture: str
    config: dict[str, Any] = field(hash=False)
    text: bool = True

    @property
    def is_decoder(self) -> bool:
        return self.architecture.endswith(("ForCausalLM", "LMHeadModel"))


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", "LlamaForCausalLM", {"model_type": "llama", **_DECODER}),
    "qwen2": Family("Qwen2", "Qwen2ForCausalLM", {"model_type": "qwen2", **_DECODER, "tie_word_embeddings": True}),
    "qwen3": Family("Qwen3", "Qwen3ForCausalLM", {"model_type": "qwen3", **_DECODER, "head_dim": 16}),
    "mistral": Family(
        "Mistral", "MistralForCausalLM", {"model_type": "mistral", **_DECODER, "head_dim": 16, "sliding_window": None}
    ),
    "phi3": Family(
        "Phi-3", "Phi3ForCausalLM", {"model_type": "phi3", **_DECODER, "original_max_position_embeddings": 128}
    ),
    "gemma2": Family("Gemma 2", "Gemma2ForCausalLM", {"model_type": "gemma2", **_DECODER, **_WINDOW}),
    "gemma3": Family(
        "Gemma 3",
        "Gemma3ForCausalLM",
        {"model_type": "gemma3_text", **_DECODER, **_WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": Family(
        "GPT-2",
        "GPT2LMHeadModel",
        {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": Family("GPT-NeoX", "GPTNeoXForCausalLM", {"model_type": "gpt_neox", **_ENCODER}),
    "opt": Family(
        "OPT",
        "OPTForCausalLM",
        {"model_type": "opt", "vocab_size": VOCABULARY, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": 64, **_SPECIAL},
    ),
    "mixtral": Family(
        "Mixtral",
        "MixtralForCausalLM",
        {"model_type": "mixtral", **_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": Family(
        "Qwen3-MoE",
        "Qwen3MoeForCausalLM",
        {"model_type": "qwen3_moe", **_DECODER, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 32},
    ),
    "bert": Family("BERT", "BertForSequenceClassification", {"model_type": "bert", **_ENCODER}),
    "roberta": Family("RoBERTa", "RobertaForMaskedLM", {"model_type": "roberta", **_ENCODER}),
    "distilbert": Family(
        "DistilBERT",
        "DistilBertModel",
        {"model_type": "distilbert", "vocab_size": VOCABULARY, "dim": 64, "hidden_dim": 96, "n_layers": 2}
        | {"n_heads": 4, "max_position_embeddings": 128},
    ),
    "t5": Family(
        "T5",
        "T5ForConditionalGeneration",
        {"model_type": "t5", "vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2}
        | {"num_heads": 4, "decoder_start_token_id": 0},
    ),
    "vit": Family(
        "ViT",
        "ViTForImageClassification",
        {"model_type": "vit", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "image_size": 32, "patch_size": 8},
        text=False,
    ),
    "whisper": Family(
        "Whisper",
        "WhisperForConditionalGeneration",
        {"model_type": "whisper", "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
        | {"max_source_positions": 48, "max_target_positions": 64, "num_mel_bins": 16, "decoder_start_token_id": 3}
        | {"suppress_tokens": None, "begin_suppress_tokens": None, **_SPECIAL},
        text=False,
    ),
}

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "A man is feeding a mouse to a snake, and a child is riding a horse.",
    "Numbers such as 1234 and 5.75 are in here too.",
]


def make_model(family: Family, **changes: Any) -> Any:
    """Return a random float32 model in eval mode; its weights are wide enough that outputs differ clearly."""
    import torch
    import transformers

    torch.manual_seed(0)
    settings = {key: value for key, value in family.config.items() if key != "model_type"} | changes
    config = transformers.AutoConfig.for_model(family.config["model_type"], **settings)
    model = getattr(transformers, family.architecture)._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.copy_(
                    torch.randn(parameter.shape) * (0.1 if "embed" in name else 0.3 if "lm_head" in name else 0.12)
                )
            else:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.tie_weights()
    return model


def make_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer of `VOCABULARY` tokens that puts its BOS first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def save_family(name: str, folder: Path, *, dtype: str = "float32", shard: str = "5GB", **changes: Any) -> Path:
    """Write a tiny model of a family, and the tokenizer where it reads text, into `folder`."""
    import torch

    family = FAMILIES[name]
    model = make_model(family, **changes)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    if family.text:
        make_tokenizer().save_pretrained(folder)
    return folder


def save_head(name: str, architecture: str, folder: Path, **changes: Any) -> Path:
    """Write a tiny model of a family with another head, and the tokenizer."""
    family = replace(FAMILIES[name], architecture=architecture)
    make_model(family, **changes).save_pretrained(folder)
    if family.text:
        make_tokenizer().save_pretrained(folder)
    return folder


def save_sentence_folder(
    folder: Path,
    *,
    pooling: dict[str, Any] | None = None,
    dense: int = 0,
    normalize: bool = True,
    transformer: str = "",
    name: str = "bert",
    architecture: str = "BertModel",
) -> Path:
    """Write a tiny sentence-transformers folder.

    Args:
        folder: where.
        pooling: the pooling's config; the mean when left out.
        dense: width of a dense layer after the pooling, none when 0.
        normalize: add the module that gives embeddings length 1.
        transformer: the transformer's own folder, the root when empty.
        name: the family of the transformer.
        architecture: its class.
    """
    import torch
    from safetensors.torch import save_file

    save_head(name, architecture, folder / transformer)
    files: dict[str, Any] = {"1_Pooling/config.json": pooling or {"pooling_mode_mean_tokens": True}}
    modules = [(transformer, "Transformer"), ("1_Pooling", "Pooling")]
    if dense:
        torch.manual_seed(1)
        function = "torch.nn.modules.activation.Tanh"
        files["2_Dense/config.json"] = {"in_features": 64, "out_features": dense, "activation_function": function}
        (folder / "2_Dense").mkdir()
        weights = {"linear.weight": torch.randn(dense, 64), "linear.bias": torch.randn(dense)}
        save_file(weights, folder / "2_Dense" / "model.safetensors")
        modules.append(("2_Dense", "Dense"))
    if normalize:
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
    files["modules.json"] = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    files["sentence_bert_config.json"] = {"max_seq_length": 64, "do_lower_case": False}
    for path, content in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(content), encoding="utf-8")
    return folder


def random_rows(count: int = 6, length: int = 24, seed: int = 0) -> list[list[int]]:
    """Return rows of random token ids without the special ones."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()
