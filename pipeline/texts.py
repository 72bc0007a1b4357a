"""Texts for `llmopt infer`: read one after the other, made into tokens, and put side by side as arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.records import Document
from ..calibration.source import Source, open_source
from ..core.errors import UsageError
from ..core.untrusted import read_json
from ..models.locate import context_length

if TYPE_CHECKING:
    from ..core.runtime import Arrays

UNLIMITED = 512
"""Tokens kept of a text where the model sets no limit."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text as tokens.

    Attributes:
        ids: the tokens, special ones too; may be empty.
        types: 0 for the first text of a pair, 1 for the second; None where the tokenizer makes none.
        offsets: first and last place of each token in the text; None when nobody asked.
        special: 1 for tokens that stand for no text; None when nobody asked.
        cut: whether the text was longer.
    """

    ids: list[int]
    types: list[int] | None = None
    offsets: list[tuple[int, int]] | None = None
    special: list[int] | None = None
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Texts:
    """A file of texts, or of pairs of texts."""

    first: Source
    second: Source | None

    def read(self, tokenizer: Any) -> Iterator[tuple[Document, Document | None]]:
        """Yield the texts in order.

        Raises:
            UsageError: a column is not there.
            LlmoptError: the file is damaged, or a row holds no text.
        """
        texts = self.first.documents(tokenizer, running=False)
        seconds = repeat(None) if self.second is None else self.second.documents(tokenizer, running=False)
        yield from zip(texts, seconds, strict=False)


def open_texts(path: str, column: str | None, pair_column: str | None) -> Texts:
    """Find a file of texts; nothing is read.

    Raises:
        UsageError: there is no such file, its kind is unknown, or it cannot have columns.
        LlmoptError: it is empty.
    """
    first = open_source(path, column)
    if first.path is None:
        raise UsageError(f"`{path}` is no file", hint="give texts in a .txt, .jsonl, .csv or .parquet file")
    return Texts(first, open_source(path, pair_column) if pair_column is not None else None)


class Encoder:
    """Makes tokens of texts, at most `longest` of each.

    Args:
        tokenizer: of the model.
        longest: tokens kept of a text, special ones included.
        places: whether to keep where in the text each token stands.
    """

    def __init__(self, tokenizer: Any, longest: int, *, places: bool = False) -> None:
        self._tokenizer = tokenizer
        self._longest = longest
        self._places = places

    def __call__(self, texts: Sequence[tuple[Document, Document | None]]) -> list[Encoded]:
        """Return each text as tokens."""
        found: dict[int, Encoded] = {}
        for special in (True, False):
            places = [place for place, (text, _) in enumerate(texts) if text.special is special]
            if places:
                made = self._encode([texts[place] for place in places], special=special)
                found.update(zip(places, made, strict=True))
        return [found[place] for place in range(len(texts))]

    def _encode(self, texts: Sequence[tuple[Document, Document | None]], *, special: bool) -> list[Encoded]:
        fast = bool(getattr(self._tokenizer, "is_fast", False))
        seconds = [second.text for _, second in texts if second is not None]
        made = self._tokenizer(
            [first.text for first, _ in texts],
            seconds or None,
            add_special_tokens=special,
            truncation=True,
            max_length=self._longest,
            return_attention_mask=False,
            return_offsets_mapping=self._places and fast,
            return_special_tokens_mask=self._places,
        )
        none = [None] * len(texts)
        cut = [bool(one.overflowing) for one in made.encodings] if fast else [False] * len(texts)
        columns = [made.get(name, none) for name in ("token_type_ids", "offset_mapping", "special_tokens_mask")]
        rows = zip(made["input_ids"], *columns, cut, strict=True)
        return [Encoded(*row) for row in rows]


def side_by_side(rows: Sequence[Encoded], padding: int) -> Arrays:
    """Return a batch as arrays (batch, sequence), padded at the right."""
    import numpy as np

    width = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), width), padding, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    types = np.zeros((len(rows), width), np.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = row.ids
        mask[at, : len(row.ids)] = 1
        types[at, : len(row.ids)] = row.types or 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {**inputs, "token_type_ids": types} if rows[0].types is not None else inputs


def longest_text(directory: Path, config: dict[str, Any], asked: int | None, *, reserved: int = 0) -> int:
    """Return how many tokens of a text are kept.

    Args:
        directory: the artifact.
        config: its config.json.
        asked: by the user; as many as the model takes when None.
        reserved: tokens of the context that are needed for something else.

    Raises:
        UsageError: more were asked for than the model takes.
    """
    context = context_length(config)
    if context is not None:
        # Models that count positions from behind the padding token (RoBERTa) have two that no text reaches.
        context -= (2 if (context - 2).bit_count() == 1 and context > 2 else 0) + reserved
    if asked is not None:
        if context is not None and asked > context:
            raise UsageError(
                f"--max-length {asked} is more than the model takes",
                where=f"config.json leaves {context} tokens for a text",
                hint=f"use --max-length {context} or less",
            )
        return asked
    limits = [context, _number(directory / "tokenizer_config.json", "model_max_length")]
    limits.append(_number(directory / "sentence_bert_config.json", "max_seq_length"))
    return max(1, min((limit for limit in limits if limit is not None), default=UNLIMITED))


def _number(path: Path, name: str) -> int | None:
    try:
        value = read_json(path).get(name)
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, int) and 0 < value < 1 << 30 else None
