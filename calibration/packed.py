"""Text to learn from: read once, tokenized, and kept on disk, so that memory does not follow its length.

Texts are packed as for calibration: each with the special tokens that the tokenizer itself adds, concatenated, cut into
full windows. With packing off one text is one row.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, overload

from ..core.errors import LlmoptError
from ..core.text import TextRequest, TextRows
from .labelled import labelled_rows
from .source import open_source
from .tokens import encode

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from ..core.progress import Reporter
    from .source import Source

SHORTEST = 2
"""A row of one token predicts nothing."""

_HELD_OUT_SHARE = 10
"""At most one row in so many is held out."""


class StoredRows(Sequence[Sequence[int]]):
    """Rows in a file of token ids (int32), read one at a time.

    Args:
        path: the file.
        starts: where each row begins, and at the end where the last one ends.
        chosen: which rows, in order.
    """

    def __init__(self, path: Path, starts: Any, chosen: Any) -> None:
        import numpy as np

        self._tokens = np.memmap(path, dtype=np.int32, mode="r")
        self._starts, self._chosen = starts, chosen

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> StoredRows: ...
    def __getitem__(self, index: int | slice) -> list[int] | StoredRows:
        """Return a row, or some of the rows."""
        if isinstance(index, slice):
            part = object.__new__(StoredRows)
            part._tokens, part._starts, part._chosen = self._tokens, self._starts, self._chosen[index]
            return part
        row = self._chosen[index]
        return self._tokens[self._starts[row] : self._starts[row + 1]].tolist()


def load_rows(
    request: TextRequest,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    seed: int,
    reporter: Reporter,
) -> TextRows:
    """Tokenize text into a file and divide its rows into those to learn from and those held out.

    Args:
        request: the data, and how much of it is of use; reading stops there.
        tokenizer: the model's tokenizer.
        path: the file to write.
        seed: which rows are held out.
        reporter: is told how much it became.

    Raises:
        UsageError: the data is not there or has no such column.
        LlmoptError: the data is damaged, or holds no row.
    """
    import numpy as np

    assert request.data is not None, "the pipeline names it"
    source = open_source(request.data, request.column)
    digest, lengths, keys, labels = hashlib.sha256(), [], [], []
    with path.open("wb") as file:
        for row, label in islice(_found(source, request, tokenizer), request.rows + request.held_out):
            data = np.array(row, dtype=np.int32).tobytes()
            digest.update(len(data).to_bytes(8, "little") + data)
            if label is not None:
                digest.update(label.to_bytes(8, "little"))
                labels.append(label)
            file.write(data)
            lengths.append(len(row))
            keys.append(hash(data))
    if not lengths:
        raise LlmoptError(
            f"`{request.data}` holds too little text",
            where=f"not one row of {request.length} tokens" if request.packing else "not one text of two tokens",
            hint="name more text, or use a smaller length",
        )
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    held = min(request.held_out, len(lengths) // _HELD_OUT_SHARE)
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)  # noqa: S311  which rows are held out is no secret
    known = {keys[index] for index in order[:held]}  # data may hold a text twice
    chosen = np.array(sorted(index for index in order[held:] if keys[index] not in known), dtype=np.int64)
    held_out = np.array(sorted(order[:held]), dtype=np.int64)
    reporter.note(
        f"text: {len(chosen)} rows to learn from, {held} to measure with, {int(starts[-1])} tokens ({source.label})"
    )
    return TextRows(
        StoredRows(path, starts, chosen),
        StoredRows(path, starts, held_out),
        request.data,
        digest.hexdigest(),
        labels=[labels[index] for index in chosen] if labels else None,
        held_out_labels=[labels[index] for index in held_out] if labels else None,
    )


def _found(
    source: Source, request: TextRequest, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], int | None]]:
    """Yield rows, each with its label where labels are asked for."""
    if request.labels is not None:
        yield from labelled_rows(source, request, tokenizer)
        return
    running = source.is_text and request.packing
    documents = (one for one in source.documents(tokenizer, running=running) if running or one.text.strip())
    encoded = encode(documents, tokenizer, length=None if request.packing else request.length)
    yield from ((row, None) for row in _rows(encoded, request))


def _rows(encoded: Iterator[list[int]], request: TextRequest) -> Iterator[list[int]]:
    """Yield rows, packed or a text each."""
    buffer: list[int] = []
    for ids in encoded:
        if request.packing:
            buffer += ids
            whole = len(buffer) // request.length * request.length
            made = [buffer[start : start + request.length] for start in range(0, whole, request.length)]
            del buffer[:whole]
        else:
            made = [ids] if len(ids) >= SHORTEST else []
        yield from made
