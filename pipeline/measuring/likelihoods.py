"""How likely a causal language model finds what follows a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...core.errors import LlmoptError
from ...core.runtime import Session
from ...models.locate import context_length
from ..batching import by_tokens
from ..texts import Encoded
from .subjects import Subject
from .tasks import LOGITS_PER_BATCH, batch_inputs, output


def continuation(subject: Subject, context: str, text: str) -> tuple[Encoded, int]:
    """Return a context and what follows it as tokens, cut at the left, and where the latter begins.

    Raises:
        LlmoptError: what follows is longer than the context of the model.
    """
    whole, first = token_ids(subject, context + text), token_ids(subject, context)
    start = len(first)
    if not first:  # something must stand before the first predicted token
        tokenizer = subject.tokenizer()
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        whole, start = [int(begin or 0), *whole], 1
    start = min(start, len(whole) - 1)
    longest = context_length(subject.config) or len(whole)
    if len(whole) - start >= longest:
        raise LlmoptError(
            "an answer is longer than the context of the model",
            where=f"{len(whole) - start} tokens: {text.strip():.60}…",
            hint=f"config.json of `{subject.name}` says {longest}; take the row out",
        )
    cut = max(0, len(whole) - longest)
    return Encoded(whole[cut:]), start - cut


def token_ids(subject: Subject, text: str) -> list[int]:
    """Return a text as tokens, without the token that ends texts if the tokenizer added it."""
    tokenizer = subject.tokenizer()
    ids = [int(token) for token in tokenizer(text)["input_ids"]]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and not is_end(text, tokenizer) else ids


def is_end(text: str, tokenizer: Any) -> bool:
    """Return whether a text itself ends with the token that ends texts."""
    return bool(tokenizer.eos_token) and text.endswith(str(tokenizer.eos_token))


def log_likelihoods(
    subject: Subject, session: Session, texts: Sequence[tuple[Encoded, int]]
) -> list[tuple[float, bool]]:
    """Return for each text the log-likelihood of its tokens from a place on, and whether each was the likeliest.

    Args:
        subject: the model.
        session: the model, opened.
        texts: tokens, and the place of the first one that counts, at least 1.
    """
    import numpy as np

    from ...evaluation.parity import log_softmax

    budget = max(1, LOGITS_PER_BATCH // int(subject.config.get("vocab_size", 1 << 16)))
    found: dict[int, tuple[float, bool]] = {}
    for batch in by_tokens([len(text.ids) for text, _ in texts], budget):
        rows = [texts[place] for place in batch]
        logits = output(session, batch_inputs([text for text, _ in rows], subject), "logits", subject)
        for place, (text, start), scores in zip(batch, rows, logits, strict=True):
            wanted = np.array(text.ids[start:])
            logs = log_softmax(scores[start - 1 : len(text.ids) - 1])
            greedy = bool((logs.argmax(-1) == wanted).all())
            found[place] = float(logs[np.arange(len(wanted)), wanted].sum()), greedy
    return [found[place] for place in range(len(texts))]
