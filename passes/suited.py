"""Which losses suit a model, as far as its outline tells."""

from __future__ import annotations

from typing import Any

from ..core.facts import ModelFacts

LOGITS = frozenset({"kl", "reverse_kl", "js", "lm"})
"""Losses of logits."""

WITHOUT_TEACHER = frozenset({"lm", "labels"})
"""Losses that the data alone gives."""


def unsuited(loss: str, facts: ModelFacts) -> str | None:
    """Return why a loss does not suit a model, None where it does."""
    if loss == "lm" and not facts.is_causal_lm:
        return "it does not predict the next token"
    if loss in LOGITS and not has_logits(facts):
        return "it has no head, and so no logits"
    if loss == "relation" and facts.is_causal_lm:
        return "tokens of a decoder relate to those before them only; it is for encoders"
    if loss == "cosine" and has_logits(facts):
        return "it makes no embeddings of texts"
    if loss == "labels" and not facts.is_causal_lm and classes(facts) is None:
        return "it neither continues texts nor tells classes of them apart"
    return None


def has_logits(facts: ModelFacts) -> bool:
    """Return whether a model answers with logits: its class has a head."""
    return "For" in facts.architecture or facts.architecture.endswith("LMHeadModel")


def classes(facts: ModelFacts) -> tuple[str, ...] | None:
    """Return the names of the classes that a model tells apart, None for one that does not choose one of several."""
    kinds = {"regression", "multi_label_classification"}
    named: dict[Any, Any] = facts.config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}
    if (
        not facts.architecture.endswith("ForSequenceClassification")
        or facts.config.get("problem_type") in kinds
        or len(named) < 2
    ):
        return None
    return tuple(str(named[number]) for number in sorted(named, key=int))
