"""Which part of a model a tensor belongs to, as far as its name tells: for people who ask where the bytes went."""

from __future__ import annotations

import re
from collections.abc import Iterable

PARTS: tuple[str, ...] = ("embeddings", "attention", "mlp", "head", "norms", "unnamed", "other")
"""`unnamed` are matrices of a traced graph that has lost their names; what lies beside the weights is no part."""

_NORM = re.compile(r"(\w*norm\w*|ln_?\w+)", re.IGNORECASE)
_RULES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("head", re.compile(r"(^|\.)(lm_head|embed_out|classifier|score|qa_outputs|pooler|cls|vocab_projector)(\.|$)")),
    (
        "attention",
        re.compile(r"attn|attention|(^|\.)(qkv|query_key_value|[qkvo]_proj|[qkv]_lin|out_lin)(\.|$)", re.IGNORECASE),
    ),
    ("embeddings", re.compile(r"embed|(^|\.)(wte|wpe|shared|relative_attention_bias)(\.|$)", re.IGNORECASE)),
    (
        "mlp",
        re.compile(
            r"mlp|ffn|feed_forward|feedforward|expert|moe|dense(relu|gated)|(^|\.)(fc\d|wi(_\d)?|wo|lin\d|router)(\.|$)"
            r"|\d\.(intermediate|output)\.",
            re.IGNORECASE,
        ),
    ),
)
_UNNAMED = re.compile(r"(val|value|constant|onnx|node|self_\d|_)[._:]*\w*", re.IGNORECASE)


def part_of(name: str, *, matrix: bool = True) -> str:
    """Return the part of `PARTS` that a tensor's name points to.

    Args:
        name: the tensor's.
        matrix: whether it has two dimensions or more.
    """
    modules = name.removesuffix(".weight").removesuffix(".bias").split(".")
    if any(_NORM.fullmatch(module) for module in modules[-2:]):
        return "norms"
    for part, rule in _RULES:
        if rule.search(name):
            return part
    return "unnamed" if matrix and "." not in name.partition("::")[0] and _UNNAMED.fullmatch(name) else "other"


def bytes_by_part(tensors: Iterable[tuple[str, int, bool]]) -> dict[str, int]:
    """Return the bytes of each part that there is, in the order of `PARTS`.

    Args:
        tensors: name, bytes, and whether it has two dimensions or more.
    """
    sizes = dict.fromkeys(PARTS, 0)
    for name, nbytes, matrix in tensors:
        sizes[part_of(name, matrix=matrix)] += nbytes
    return {part: nbytes for part, nbytes in sizes.items() if nbytes}
