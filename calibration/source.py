"""What the user names as data, and the texts in it.

| named | what a text is |
| --- | --- |
| FILE.txt | packed and for evaluation: the whole file, one running text; with packing off: a line that is not blank |
| FILE.jsonl | a row: `text`, `messages` through the chat template, `prompt` + `completion`, or the column named |
| FILE.csv | a row: the same columns; a number as column says that there is no header |
| FILE.parquet | a row: the same columns, and only they are read |
| hf:NAME[/CONFIG][:SPLIT] | a row, through `datasets` |

Where none of these columns is there, the only column of text is taken. Texts are streamed: no file is held in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.digests import file_sha256
from ..core.errors import LlmoptError, UsageError
from .files import csv_records, has_no_header, jsonl_records, parquet_records, text_blocks, text_lines
from .hub import hub_records, parse_hub_spec
from .records import Document, Record, documents_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class Source:
    """Data that was found, and not yet read.

    Attributes:
        spec: what the user wrote.
        column: the column that the user named.
        path: the file; None for a data set behind `hf:`.
    """

    spec: str
    column: str | None
    path: Path | None

    @property
    def label(self) -> str:
        """A short name for messages."""
        return self.path.name if self.path else self.spec

    @property
    def is_text(self) -> bool:
        """Whether it is a plain text, which can be read as one running text."""
        return self.path is not None and self.path.suffix == ".txt"

    def documents(self, tokenizer: PreTrainedTokenizerBase, *, running: bool) -> Iterator[Document]:
        """Yield the texts in order, empty ones too.

        Args:
            tokenizer: its chat template renders messages.
            running: read a plain text in blocks of one running text, of which the first alone gets special tokens;
                otherwise each of its lines is a text.

        Raises:
            UsageError: the column is not there.
            LlmoptError: the data is damaged, or a row holds no text.
        """
        if self.path is None or self.path.suffix != ".txt":
            origin = str(self.path) if self.path else self.spec
            yield from documents_of(self._records(), self.column, origin, tokenizer)
        elif running:
            for index, block in enumerate(text_blocks(self.path)):
                yield Document(block, special=index == 0)
        else:
            for line in text_lines(self.path):
                yield Document(line.removesuffix("\n"))

    def records(self) -> Iterator[Record]:
        """Yield whole rows: of a plain text its lines, as the column `text`.

        The columns of a CSV file whose first line holds a number are called 0, 1, 2 …

        Raises:
            LlmoptError: the data is damaged.
        """
        if self.path is None:
            return hub_records(self.spec)
        if self.is_text:
            lines = enumerate(text_lines(self.path), start=1)
            return (Record(f"line {number}", {"text": line.removesuffix("\n")}) for number, line in lines)
        if self.path.suffix == ".csv":
            return csv_records(self.path, None, header=not has_no_header(self.path))
        if self.path.suffix == ".parquet":
            return parquet_records(self.path, None, whole=True)
        return jsonl_records(self.path)

    def sha256(self) -> str | None:
        """Return the digest of the file's bytes; None for a data set behind `hf:`."""
        if self.path is None:
            return None
        return file_sha256(self.path)

    def _records(self) -> Iterator[Record]:
        if self.path is None:
            return hub_records(self.spec)
        if self.path.suffix == ".jsonl":
            return jsonl_records(self.path)
        if self.path.suffix == ".csv":
            return csv_records(self.path, self.column)
        return parquet_records(self.path, self.column)


def open_source(spec: str, column: str | None = None) -> Source:
    """Find the data that `spec` names; nothing is read and nothing heavy imported, so a plan can call it.

    Args:
        spec: the path of a file, or `hf:NAME[/CONFIG][:SPLIT]`.
        column: the column that holds the text.

    Raises:
        UsageError: there is no such file, it is a folder, its kind is unknown, or it cannot have columns.
        LlmoptError: the file is empty.
    """
    if spec.startswith("hf:"):
        parse_hub_spec(spec)
        return Source(spec, column, None)
    path = Path(spec)
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix in SUFFIXES)
        hint = f"name a file in it: {path / inside[0]}" if inside else f"read it as a data set: hf:{path}"
        raise UsageError(f"`{spec}` is a folder", where="calibration and evaluation data is a file", hint=hint)
    if not path.exists():
        raise UsageError(f"no file `{spec}`", where=f"looked in {path.absolute().parent}", hint=_where_else(path))
    if path.suffix not in SUFFIXES:
        also = f", or read it through `datasets`: hf:{path}" if path.suffix in {".json", ".arrow"} else ""
        raise UsageError(
            f"unknown kind of data `{spec}`",
            where=f"suffix: {path.suffix or 'none'}",
            hint=f"known: {', '.join(SUFFIXES)}{also}",
        )
    if path.suffix == ".txt" and column is not None:
        raise UsageError(
            f"no column `{column}` in `{spec}`", where="a .txt file has no columns", hint="leave --column out"
        )
    if path.stat().st_size == 0:
        raise LlmoptError(f"`{spec}` is empty", where="0 bytes", hint="name a file with text in it")
    return Source(spec, column, path)


def _where_else(path: Path) -> str:
    """Return what may have been meant by a path that is not there."""
    folder = path.parent
    if not folder.is_dir():
        if len(path.parts) <= 3 and not path.suffix and not path.is_absolute():
            return f"a data set on the hub is written hf:{path}"
        return f"there is no folder `{folder}` either"
    names = [entry.name for entry in folder.iterdir() if entry.suffix in SUFFIXES]
    close = get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"did you mean `{folder / close[0]}`?" if close else f"name a file of kind {', '.join(SUFFIXES)}, or hf:NAME"
