"""Reading local files piece by piece: text, JSONL, CSV, Parquet."""

from __future__ import annotations

import csv
import io
from codecs import getincrementaldecoder
from typing import TYPE_CHECKING

from ..core.errors import LlmoptError
from .records import Record, choose_columns

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHUNK_BYTES = 1 << 16
BLOCK_CHARS = 1 << 16
CELL_CHARS = 1 << 30
PARQUET_ROWS = 1024
READ_BYTES = 1 << 20
"""Parquet is read through a buffer of this size: otherwise a whole column of a row group is held."""


def text_blocks(path: Path) -> Iterator[str]:
    """Yield a text in blocks of about 65536 characters that end where a line does; joined, they are the text."""
    buffer = ""
    for chunk in _chunks(path):
        buffer += chunk
        if len(buffer) >= BLOCK_CHARS:
            # A text without lines is cut after a space, and one without spaces where the block happens to end.
            cut = buffer.rfind("\n") + 1 or buffer.rfind(" ") + 1 or len(buffer)
            yield buffer[:cut]
            buffer = buffer[cut:]
    if buffer:
        yield buffer


def text_lines(path: Path) -> Iterator[str]:
    r"""Yield the lines of a text with their line ends. Only a line feed ends one: `\u2028` in JSON does not."""
    parts: list[str] = []
    for chunk in _chunks(path):
        head, *rest = chunk.split("\n")
        parts.append(head)
        for part in rest:
            yield "".join(parts) + "\n"
            parts = [part]
    if last := "".join(parts):
        yield last


def jsonl_records(path: Path) -> Iterator[Record]:
    """Yield the objects of a JSONL file; blank lines are passed over."""
    import msgspec

    decoder = msgspec.json.Decoder()
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        try:
            values = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise LlmoptError(
                f"line {number} of `{path}` is no JSON", where=str(error), hint="a .jsonl file holds one object a line"
            ) from error
        if not isinstance(values, dict):
            raise LlmoptError(
                f"line {number} of `{path}` is no object",
                where=f"it holds {line.strip()[:80]}",
                hint='a row looks like {"text": "…"}',
            )
        yield Record(f"line {number}", values)


def csv_records(path: Path, column: str | None, *, header: bool | None = None) -> Iterator[Record]:
    """Yield the rows of a CSV file by the names in its header.

    A `column` that is a number, and no name in the first line, says that the file has no header: the columns are then
    called 0, 1, 2 … and the first line is a row like the others. So does `header`, where it is given.
    """
    limit = csv.field_size_limit(CELL_CHARS)  # the default refuses texts of more than 131072 characters
    reader = csv.reader(text_lines(path), strict=True)
    names: list[str] = []
    try:
        for row in reader:
            if not row:
                continue
            if not names:
                headless = not header
                if header is None:
                    headless = column is not None and column.isdecimal() and column not in row
                names = [str(index) for index in range(len(row))] if headless else row
                if not headless:
                    continue
            if len(row) != len(names):
                raise LlmoptError(
                    f"line {reader.line_num} of `{path}` has {len(row)} columns",
                    where=f"the first line has {len(names)}: {', '.join(names)}",
                    hint='put texts that hold a comma in "quotes"',
                )
            yield Record(f"line {reader.line_num}", dict(zip(names, row, strict=True)))
    except csv.Error as error:
        raise LlmoptError(
            f"cannot read line {reader.line_num} of `{path}` as CSV",
            where=str(error),
            hint='a quote inside a quoted text is written twice: ""',
        ) from error
    finally:
        csv.field_size_limit(limit)


def has_no_header(path: Path) -> bool:
    """Return whether a number stands in the first line of a CSV file: then it is a row, and names no columns."""
    try:
        first = next((row for row in csv.reader(text_lines(path)) if row), [])
    except csv.Error:  # said with its line when the rows are read
        return False
    return any(_is_number(cell) for cell in first)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def parquet_records(path: Path, column: str | None, *, whole: bool = False) -> Iterator[Record]:
    """Yield the rows of a Parquet file, batch by batch and only the columns that hold the text, unless `whole`."""
    import pyarrow as pa
    from pyarrow import parquet, types

    try:
        with parquet.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
            fields = {field.name: field.type for field in file.schema_arrow}
            kinds = {
                name: "text" if types.is_string(kind) or types.is_large_string(kind) else None
                for name, kind in fields.items()
            }
            columns = list(fields) if whole else list(choose_columns(kinds, column, str(path)))
            row = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                for values in batch.to_pylist():
                    row += 1
                    yield Record(f"row {row}", values)
    except (pa.ArrowException, OSError) as error:
        raise LlmoptError(
            f"cannot read `{path}` as Parquet", where=str(error), hint="write or download the file again"
        ) from error


def _chunks(path: Path) -> Iterator[str]:
    r"""Yield a file as decoded chunks, with `\n` for every line end and without a byte order mark."""
    inner = getincrementaldecoder("utf-8")()
    decoder = io.IncrementalNewlineDecoder(inner, translate=True)
    taken, lines, first = 0, 0, True
    try:
        with path.open("rb") as file:
            while True:
                data = file.read(CHUNK_BYTES)
                taken += len(data)
                chunk = decoder.decode(data, final=not data)
                lines += chunk.count("\n")
                yield chunk.removeprefix("\ufeff") if first else chunk
                first = False
                if not data:
                    return
    except UnicodeDecodeError as error:
        # The decoder was given what it had kept of the chunk before, and this one.
        offset = taken - len(error.object) + error.start
        encoding = "utf-16" if offset == 0 and error.object[0] in (0xFE, 0xFF) else "latin1"  # 0: a byte order mark
        line = lines + error.object[: error.start].count(b"\n") + 1
        raise LlmoptError(
            f"`{path}` is not UTF-8",
            where=f"byte {offset}, line {line}: 0x{error.object[error.start]:02x}",
            hint=f"convert it, for example with: iconv -f {encoding} -t utf-8 {path.name}",
        ) from error
    except OSError as error:
        raise LlmoptError(f"cannot read `{path}`", where=error.strerror, hint="check the file's permissions") from error
