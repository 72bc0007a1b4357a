"""Tracing attention as the operators of `graphs/attention.py`, by standing in for the one that transformers calls.

Imported lazily: it registers the operators with torch.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..graphs.attention import ATTENTION, DOMAIN, MASK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

_TYPES = [f"tensor({name})" for name in ("bool", "int64", "float", "float16", "bfloat16", "double")]
_ATTENTION = "(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, float softcap, bool causal) -> Tensor"
_MASK = "(Tensor? padding, SymInt batch, SymInt queries, SymInt keys, bool causal, int window) -> Tensor"


@torch.library.custom_op("llmopt::attention", mutates_args=(), schema=_ATTENTION)
def attention(  # noqa: PLR0917 -- the operator's own order
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float, causal: bool
) -> Tensor:
    """Compute attention; the shapes are those of `graphs/attention.py`."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query * scale) @ key.transpose(-1, -2)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    lowest = torch.finfo(scores.dtype).min
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), lowest)
    if mask is not None:
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous()


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    del key
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))


@torch.library.custom_op("llmopt::mask", mutates_args=(), schema=_MASK)
def mask(  # noqa: PLR0917 -- the operator's own order
    padding: Tensor | None, batch: int, queries: int, keys: int, causal: bool, window: int
) -> Tensor:
    """Return which keys a query sees, (batch, 1, queries, keys)."""
    places = torch.arange(keys)
    own = torch.arange(keys - queries, keys)[:, None]
    seen = places <= own if causal else torch.ones(queries, keys, dtype=torch.bool)
    if window:
        seen = seen & (places > own - window)
    seen = seen.expand(batch, 1, queries, keys)
    return seen.clone() if padding is None else seen & padding.bool()[:, None, None, :]


@mask.register_fake
def _(padding: Tensor | None, batch: int, queries: int, keys: int, *_: Any) -> Tensor:
    device = "cpu" if padding is None else padding.device
    return torch.empty((batch, 1, queries, keys), dtype=torch.bool, device=device)


def _operator(name: str, inputs: str, attributes: dict[str, str]) -> Any:
    """Describe an operator of ours to the tracer; every input may be left out, and be of its own type."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    names = inputs.split()
    optional = OpSchema.FormalParameterOption.Optional
    kinds = [f"T{number}" for number in range(len(names))]
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[
            OpSchema.FormalParameter(each, kind, param_option=optional) for each, kind in zip(names, kinds, strict=True)
        ],
        outputs=[OpSchema.FormalParameter("output", "U")],
        type_constraints=[(kind, _TYPES, "") for kind in (*kinds, "U")],
        attributes=[OpSchema.Attribute(each, getattr(OpSchema.AttrType, kind)) for each, kind in attributes.items()],
    )
    return Op(Opset(DOMAIN, 1), name, schema)


def _translations() -> dict[Any, Callable[..., Any]]:
    """Return the nodes that the operators become."""
    attend = _operator(ATTENTION, "query key value mask", {"scale": "FLOAT", "softcap": "FLOAT", "causal": "INT"})
    masking = _operator(MASK, "padding batch queries keys", {"causal": "INT", "window": "INT"})

    def attention_node(query: Any, key: Any, value: Any, mask: Any, *settings: Any) -> Any:
        scale, softcap, causal = settings
        return attend(query, key, value, mask, scale=scale, softcap=softcap, causal=int(causal))

    def mask_node(padding: Any, batch: Any, queries: Any, keys: Any, *settings: Any) -> Any:
        causal, window = settings
        return masking(padding, batch, queries, keys, causal=int(causal), window=window)

    return {torch.ops.llmopt.attention.default: attention_node, torch.ops.llmopt.mask.default: mask_node}


@contextmanager
def attention_as_one_node(model: Any) -> Iterator[None]:
    """Have `model` compute its attention with the operators above, where it goes through transformers' interface."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.exporters import exporter_onnx

    table = exporter_onnx._ONNX_TRANSLATION_TABLE  # pyright: ignore[reportPrivateUsage]
    operators = _translations()
    AttentionInterface.register(DOMAIN, _attention)
    AttentionMaskInterface.register(DOMAIN, _mask)
    table.update(operators)
    former = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        for config, _ in former:
            config._attn_implementation = DOMAIN
        yield
    finally:
        for config, name in former:
            config._attn_implementation = name
        for operator in operators:
            del table[operator]


def _configs(model: Any) -> list[Any]:
    """Return the configs, the model's and those of its parts, whose attention goes through transformers' interface."""
    # Attention sinks are one more logit, which our operator does not have.
    if not model._can_set_attn_implementation() or any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return []
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    taken = ("sdpa", "eager")
    return [each for each in configs.values() if getattr(each, "_attn_implementation", None) in taken]


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention, for transformers' interface."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None
    if position_bias is not None:
        attention_mask, causal = _biased(position_bias, attention_mask, query, key, causal=causal), False
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else float(scaling)
    out = torch.ops.llmopt.attention(query, key, value, attention_mask, scale, float(softcap or 0), causal)
    return out, None


def _biased(bias: Tensor, mask: Tensor | None, query: Tensor, key: Tensor, *, causal: bool) -> Tensor:
    """Return a floating-point mask that adds `bias` where keys are seen."""
    if mask is None and causal:
        mask = torch.ops.llmopt.mask(None, query.shape[0], query.shape[2], key.shape[2], True, 0)
    if mask is None:
        return bias
    if mask.dtype != torch.bool:
        return bias + mask
    return torch.where(mask, bias, torch.finfo(bias.dtype).min)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **rest: Any,
) -> Tensor | None:
    """Make a mask for transformers' interface, as one operator where it is one of the usual kinds."""
    from transformers import masking_utils

    kind = None if use_vmap else _kind(mask_function)
    offset = rest.get("kv_offset", 0)
    if kind is None or not isinstance(offset, int) or offset:
        return masking_utils.sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
            **{**rest, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
        )
    causal, window = kind
    if attention_mask is None and not causal:
        return None
    return torch.ops.llmopt.mask(attention_mask, batch_size, q_length, kv_length, causal, window)


def _kind(function: Callable[..., Any]) -> tuple[bool, int] | None:
    """Return whether a mask function of transformers is causal, and its window (0: none); None for any other."""
    from transformers import masking_utils

    if function is masking_utils.bidirectional_mask_function:
        return False, 0
    if function is masking_utils.causal_mask_function:
        return True, 0
    parts = _closure(function).get("mask_functions", ())
    if len(parts) == 2 and parts[1] is masking_utils.causal_mask_function:
        overlay = parts[0]
        if overlay.__qualname__.startswith("sliding_window_overlay."):
            return True, int(_closure(overlay)["sliding_window"])
    return None


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))
