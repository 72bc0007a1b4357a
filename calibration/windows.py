"""Text for evaluation: one running text in windows that do not overlap, as perplexity is commonly measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.errors import LlmoptError
from .records import Document
from .source import open_source
from .tokens import encode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

CHARS_PER_TOKEN = 8
MARGIN_TOKENS = 64
"""Where a text is cut short, its last tokens may differ from those of the whole text; so many are not used."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Rows of token ids, to be scored one by one or batched without padding.

    Attributes:
        rows: a BOS where the tokenizer has one, then `length` tokens.
        tokens: how many tokens of `rows` are predicted: all but the first of each row.
        source: the data, as the user named it.
    """

    rows: list[list[int]]
    tokens: int
    source: str


def load_windows(
    data: str, column: str | None, tokenizer: PreTrainedTokenizerBase, *, length: int, limit: int | None
) -> Windows:
    r"""Cut data into windows of `length` tokens.

    A .txt file is one running text as it stands; the texts of other data are joined with `\n\n`, empty ones too. It is
    tokenized without special tokens. With a BOS a row has `length` + 1 ids and `length` predicted tokens; without one
    it has `length` ids and predicts one less. The last window is dropped if it is not full, unless it is the only one.

    Args:
        data: a file, or `hf:NAME[/CONFIG][:SPLIT]`.
        column: the column that holds the text.
        tokenizer: the model's tokenizer.
        length: tokens in a window.
        limit: how many windows to take from the start of the text; None for all. Without it the whole text is
            tokenized at once, which takes about 200 bytes of memory per character.

    Raises:
        UsageError: the data is not there or has no such column.
        LlmoptError: the data is damaged, or holds too little text to predict one token.
    """
    source = open_source(data, column)
    separator = "" if source.is_text else "\n\n"
    texts = (document.text for document in source.documents(tokenizer, running=True))
    ids = _tokens(texts, separator, tokenizer, None if limit is None else length * limit)
    bos: list[int] = [tokenizer.bos_token_id] if isinstance(tokenizer.bos_token_id, int) else []
    full = len(ids) // length * length or len(ids)
    rows = [bos + ids[start : start + length] for start in range(0, full, length)][:limit]
    tokens = sum(len(row) - 1 for row in rows)
    if tokens < 1:
        raise LlmoptError(
            f"`{data}` holds too little text", where=f"{len(ids)} tokens", hint="name data with more text in it"
        )
    return Windows(rows, tokens, data)


def _tokens(texts: Iterator[str], separator: str, tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> list[int]:
    """Return the tokens of the joined texts, or at least the first `wanted` of them, without reading on."""
    if wanted is None:
        return next(encode([Document(separator.join(texts), special=False)], tokenizer))
    taken: list[str] = []
    missing = wanted + MARGIN_TOKENS
    while True:
        more = list(_until(texts, missing * CHARS_PER_TOKEN))
        taken += more
        ids = next(encode([Document(separator.join(taken), special=False)], tokenizer))
        missing = wanted + MARGIN_TOKENS - len(ids)
        if not more:
            return ids
        if missing <= 0:
            return ids[:wanted]


def _until(texts: Iterator[str], chars: int) -> Iterator[str]:
    """Yield texts until they hold `chars` characters."""
    while chars > 0:
        text = next(texts, None)
        if text is None:
            return
        chars -= len(text) + 1
        yield text
