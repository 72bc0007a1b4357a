"""Rows with labels: texts and their classes, or questions and the answers that continue them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ..core.errors import LlmoptError, UsageError
from ..core.text import Labels, TextRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .records import Record
    from .source import Source

_TEXT = "text"


def labelled_rows(
    source: Source, request: TextRequest, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], int]]:
    """Yield the token ids of each text, and its label as a number; see `core.text.TextRows`.

    An answer follows its question with nothing between them, and is followed by the tokenizer's end of a text. A
    question or an answer without a token is left out, and a question that leaves no room for its answer.

    Args:
        source: the data.
        request: its columns, and the tokens in a row at most.
        tokenizer: the model's tokenizer.

    Raises:
        UsageError: a column is not there.
        LlmoptError: a label is no class of the model.
    """
    labels = request.labels
    assert labels is not None, "asked for where there are some"
    column = request.column or _TEXT
    numbers = {name.lower(): number for number, name in enumerate(labels.classes or ())}
    for record in source.records():
        text, label = (_value(record, name, source) for name in (column, labels.column))
        if labels.classes is not None:
            ids: list[int] = tokenizer(text, truncation=True, max_length=request.length)["input_ids"]  # pyright: ignore[reportAssignmentType]
            yield ids, _class(record, label, numbers, labels, source)
            continue
        question, answer = _continued(text, label, tokenizer)
        if answer and 0 < len(question) < request.length:
            yield (question + answer)[: request.length], len(question)


def _continued(question: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the token ids of a question, without what ends a text, and of its answer, with it."""
    asked: list[int] = tokenizer(question, verbose=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
    end = tokenizer.eos_token_id
    if asked and asked[-1] == end:
        asked = asked[:-1]
    made: list[int] = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
    return asked, made if end is None else [*made, int(end)]  # pyright: ignore[reportArgumentType]


def _value(record: Record, column: str, source: Source) -> str:
    value = record.values.get(column)
    if value is None:
        raise UsageError(
            f"no column `{column}` in `{source.label}`",
            where=f"{record.place}: it has {', '.join(record.values)}",
            hint="name the text with --column, and the labels with --label-column",
        )
    return str(value)


def _class(record: Record, label: str, numbers: Mapping[str, int], labels: Labels, source: Source) -> int:
    """Return the number of a class that is named, or numbered."""
    text = label.strip().lower()
    found = numbers.get(text, int(text) if text.isdecimal() else -1)
    if not 0 <= found < len(numbers):
        raise LlmoptError(
            f"`{label[:80]}` is no class of the model",
            where=f"{source.label}, {record.place}: config.json has {', '.join(labels.classes or ())}"[:500],
            hint="name the column of the labels with --label-column, or write them as the model's classes",
        )
    return found
