"""From texts to token ids."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedTokenizerBase

    from .records import Document

BATCH_CHARS = 1 << 18
"""A batch ends here: a tokenizer takes about 200 bytes of memory per character while it works."""


def encode(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, *, length: int | None = None
) -> Iterator[list[int]]:
    """Yield the token ids of each document, with the special tokens that the tokenizer itself adds.

    Args:
        documents: the texts.
        tokenizer: the model's tokenizer.
        length: cut a longer text, as the tokenizer cuts it (an encoder's closing token is kept); None to keep all.
    """
    for batch in _batches(documents):
        for special, group in groupby(batch, key=lambda document: document.special):
            rows = tokenizer(
                [document.text for document in group],
                add_special_tokens=special,
                truncation=length is not None,
                max_length=length,
                padding=False,
                return_attention_mask=False,
                verbose=False,  # longer than the context is what packing is for
            )["input_ids"]
            yield from rows  # pyright: ignore[reportReturnType]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
