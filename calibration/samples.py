"""Which rows of tokens the passes measure: drawn by seed, the same on every machine.

Packing follows GPTQ (Frantar et al., 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers") and llm-compressor: documents are tokenized, each with the special tokens that the tokenizer itself adds
and no others, concatenated, and cut into full windows. No token is put between documents. A .txt file is one document;
it is tokenized in blocks that end with a line, so one token in some 16000 may differ from those of the whole text.

Neither memory nor time follows the size of the data. In a first pass every document draws a number from the seeded
generator; those with the lowest numbers are kept until they hold about eight times the characters that are needed, so
that they are spread evenly over the data. Only they are tokenized, and the rows are drawn from all of their windows.
Data that is smaller than that is used whole.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from ..core.digests import Digest, file_sha256
from ..core.errors import LlmoptError
from .source import Source, open_source
from .tokens import encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

    from ..core.progress import Reporter
    from ..core.recipe import CalibrationSpec
    from .records import Document

CHARS_PER_TOKEN = 32
"""Kept for each token needed. English has about four characters in a token, so this is eight times enough."""

CHARS_AT_LEAST = 1 << 21
"""Data of up to this many characters is used whole: it is tokenized in seconds."""

READ_AHEAD = 4
"""A data set behind `hf:` may be endless; its first part is read, this many times what is kept of it."""

SHORTEST = 2
"""A row of one token predicts nothing."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Rows of token ids. None is ever padded: packed rows have one length, others keep their own.

    Attributes:
        rows: what the passes measure.
        held_out: further rows, equal to none of `rows`, which no pass sees; fewer than asked for if the data ends.
        documents: how many texts the data holds (of a data set behind `hf:`, how many were read).
        tokens: tokens in `rows`.
        source: the data, as the user named it.
        sha256: digest of the file's bytes, or of the texts that were read from a data set.
    """

    rows: list[list[int]]
    held_out: list[list[int]]
    documents: int
    tokens: int
    source: str
    sha256: str


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Documents drawn from the data.

    Attributes:
        documents: those kept, as (number drawn, position in the data, document), by position.
        seen: how many documents were read that are not empty.
        empty: how many were empty.
        complete: whether these are all documents of the data.
        ended: whether the data was read to its end.
        sha256: digest of the texts read.
    """

    documents: list[tuple[float, int, Document]]
    seen: int
    empty: int
    complete: bool
    ended: bool
    sha256: str


@dataclass(frozen=True, slots=True)
class _Cut:
    """Rows cut from the documents drawn.

    Attributes:
        rows: at most as many as asked for.
        held_out: further rows.
        available: tokens that the documents hold, where they were packed.
        short: how many documents were too short for a row of their own.
    """

    rows: list[list[int]]
    held_out: list[list[int]]
    available: int = 0
    short: int = 0


def load_samples(
    spec: CalibrationSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    held_out: int = 0,
    reporter: Reporter,
    digest: Digest = file_sha256,
) -> Samples:
    """Read calibration data and draw `spec.samples` rows from it.

    Args:
        spec: the data, how many rows, and how long they are.
        tokenizer: the model's tokenizer.
        seed: which rows are drawn.
        held_out: how many further rows to draw for verification.
        reporter: is told how much it became, and what was left out.
        digest: gives the hash of the file.

    Raises:
        UsageError: the data is not there or has no such column.
        LlmoptError: the data is damaged, or holds fewer rows than asked for.
    """
    source = open_source(spec.data, spec.column)
    running = source.is_text and spec.packing
    weigh, budget = _budget(spec, held_out)
    while True:
        generator = random.Random(seed)  # noqa: S311  which rows are measured is no secret
        drawn = _draw(source, tokenizer, generator, weigh=weigh, budget=budget, running=running)
        if spec.packing:
            cut = _pack(drawn, tokenizer, generator, spec, held_out)
        else:
            cut = _one_each(drawn, tokenizer, spec, held_out)
        if len(cut.rows) >= spec.samples or drawn.complete:
            break
        budget *= 4  # the texts drawn have unusually few tokens
    if len(cut.rows) < spec.samples:
        raise _too_few(spec, source, drawn, cut)
    samples = Samples(
        rows=cut.rows,
        held_out=cut.held_out,
        documents=1 if running else drawn.seen,
        tokens=sum(map(len, cut.rows)),
        source=spec.data,
        sha256=drawn.sha256 if source.path is None else digest(source.path),
    )
    _report(samples, source, drawn, cut, reporter)
    return samples


def _budget(spec: CalibrationSpec, held_out: int) -> tuple[Callable[[Document], int], int]:
    """Return how a document counts, and the sum at which enough of them are kept."""
    rows = max(spec.samples, held_out)
    if spec.packing:
        return lambda document: len(document.text), max(CHARS_AT_LEAST, rows * spec.length * CHARS_PER_TOKEN)
    return lambda _: 1, 4 * rows


def _draw(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    generator: random.Random,
    *,
    weigh: Callable[[Document], int],
    budget: int,
    running: bool,
) -> _Drawn:
    """Keep the documents with the lowest random numbers whose weights just reach `budget`."""
    digest = hashlib.sha256()
    heap: list[tuple[float, int, Document]] = []  # by negated number, so that the highest is at the top
    kept = read = seen = empty = 0
    ended = True
    for position, document in enumerate(source.documents(tokenizer, running=running)):
        data = document.text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
        if not running and not document.text.strip():
            empty += 1
            continue
        seen += 1
        read += weigh(document)
        kept += weigh(document)
        heappush(heap, (-generator.random(), position, document))
        while kept - weigh(heap[0][2]) >= budget:
            kept -= weigh(heappop(heap)[2])
        if source.path is None and read >= READ_AHEAD * budget:
            ended = False
            break
    documents = sorted(((-number, position, document) for number, position, document in heap), key=lambda d: d[1])
    return _Drawn(documents, seen, empty, ended and len(documents) == seen, ended, digest.hexdigest())


def _pack(
    drawn: _Drawn, tokenizer: PreTrainedTokenizerBase, generator: random.Random, spec: CalibrationSpec, held_out: int
) -> _Cut:
    """Concatenate the documents' tokens and draw from all full windows of them."""
    stream = array("i")  # four bytes a token
    for row in encode((document for _, _, document in drawn.documents), tokenizer):
        stream.extend(row)
    windows = range(len(stream) // spec.length)
    chosen = sorted(generator.sample(windows, min(spec.samples, len(windows))))
    others = sorted(set(windows) - set(chosen))
    generator.shuffle(others)
    rows = [_window(stream, index, spec.length) for index in chosen]
    further = _unlike(rows, [_window(stream, index, spec.length) for index in others], held_out)
    return _Cut(rows, further, available=len(stream))


def _window(stream: array[int], index: int, length: int) -> list[int]:
    return stream[index * length : (index + 1) * length].tolist()


def _one_each(drawn: _Drawn, tokenizer: PreTrainedTokenizerBase, spec: CalibrationSpec, held_out: int) -> _Cut:
    """Make one row of each document, in the order of the numbers drawn, so that more held-out rows change no row."""
    documents = (document for _, _, document in sorted(drawn.documents, key=lambda d: d[:2]))
    encoded = list(encode(documents, tokenizer, length=spec.length))
    rows = [row for row in encoded if len(row) >= SHORTEST]
    further = _unlike(rows[: spec.samples], rows[spec.samples :], held_out)
    return _Cut(rows[: spec.samples], further, short=len(encoded) - len(rows))


def _unlike(rows: list[list[int]], others: list[list[int]], count: int) -> list[list[int]]:
    """Return up to `count` of the `others` that repeat none of `rows`: data may hold a text twice."""
    known = {tuple(row) for row in rows}
    return [row for row in others if tuple(row) not in known][:count]


def _report(samples: Samples, source: Source, drawn: _Drawn, cut: _Cut, reporter: Reporter) -> None:
    running = source.is_text and samples.documents == 1
    documents = "one running text" if running else _count(samples.documents, "document")
    rows = _count(len(samples.rows), "sample")
    reporter.note(f"calibration: {rows}, {samples.tokens} tokens from {documents} ({source.label})")
    if not drawn.ended:
        reporter.note(f"calibration: stopped reading after {documents}, which are enough to draw from")
    if drawn.empty:
        reporter.note(f"calibration: left out {drawn.empty} empty texts")
    if cut.short:
        reporter.note(f"calibration: left out {cut.short} of the texts drawn: fewer than {SHORTEST} tokens")


def _too_few(spec: CalibrationSpec, source: Source, drawn: _Drawn, cut: _Cut) -> LlmoptError:
    """Say how many rows there are, and what would do."""
    found = len(cut.rows)
    use = [f"--samples {found}"] if found else []
    if spec.packing:
        what = f"calibration data holds {_count(found, 'sample')} of {spec.length} tokens, {spec.samples} asked for"
        where = f"{source.spec}: {cut.available} tokens"
        if cut.available // spec.samples >= SHORTEST:
            use.append(f"--length {cut.available // spec.samples}")
    else:
        what = f"calibration data holds {_count(found, 'sample')}, {spec.samples} asked for"
        where = f"{source.spec}: {_count(drawn.seen, 'text')}, {cut.short} of them with fewer than {SHORTEST} tokens"
    hint = f"use {' or '.join(use)}, or name more text" if use else "name more text"
    return LlmoptError(what, where=where, hint=hint)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
