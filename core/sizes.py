"""The settings of config.json that widths follow from, by the names that architectures give them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

_MLP = re.compile(
    r"(moe_|shared_expert_|shared_|encoder_|decoder_)?(intermediate_size|ffn_dim|ffn_hidden_size)"
    r"|d_ff|n_inner|hidden_dim|ffn_hidden_size"
)
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_GROUPS = "num_key_value_heads"
_HEAD_SIZE = ("head_dim", "d_kv")


def text_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of config.json that describes the language model."""
    nested = config.get("text_config")
    return cast("Mapping[str, Any]", nested) if isinstance(nested, Mapping) else config


def mlp_settings(config: Mapping[str, Any]) -> dict[str, int | None]:
    """Return the numbers of neurons between the two products of an MLP; None stands for the architecture's own."""
    settings = text_settings(config)
    return {
        key: value
        for key, value in settings.items()
        if _MLP.fullmatch(key) and (value is None or (type(value) is int and value > 1))
    }


def hidden_setting(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return the setting of the residual stream's width, and its value."""
    return _first(config, _HIDDEN)


def head_setting(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return the setting of the number of query heads, and its value."""
    return _first(config, _HEADS)


def group_setting(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return the setting of the number of key and value heads, and its value; None where each query has its own."""
    return _first(config, (_GROUPS,))


def head_size_setting(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return the setting of a head's channels, and its value: the usual quotient where config.json does not say."""
    found = _first(config, _HEAD_SIZE)
    hidden, heads = hidden_setting(config), head_setting(config)
    if found is not None or hidden is None or heads is None or hidden[1] % heads[1]:
        return found
    return "head_dim", hidden[1] // heads[1]


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, int] | None:
    settings = text_settings(config)
    return next(((name, settings[name]) for name in names if type(settings.get(name)) is int), None)
