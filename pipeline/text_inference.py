"""`llmopt infer` of texts: embeddings, classes or text, for texts in batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ..calibration.records import Document
from ..core.errors import UsageError
from ..core.progress import Reporter, Step
from ..core.runtime import Session
from .batching import SIZE, BatchingParams, Cost, padded_tokens
from .costs import SECONDS, measure_costs
from .inference import ALONE, Inference, InferOptions, line, tokenizer_of
from .jobs import Generation, Job, Row, job_of
from .journal import Totals
from .texts import Encoded, Encoder, longest_text, open_texts

WINDOW = 2048
"""Texts that are sorted and batched together."""

_PROFILE_SECONDS = 0.001
"""How long costs may be measured for each text of the file."""

Pair = tuple[Document, Document | None]
"""A text, and the second one where texts come in pairs."""


class TextInference(Inference):
    """Computes texts, those of like length together.

    Args:
        directory: the artifact.
        config: its config.json.
        data: a file of texts.
        options: how.

    Raises:
        UsageError: the artifact gives no results of texts, the file is none of texts, or an option is not for it.
    """

    rows: ClassVar[str] = "texts"

    def __init__(self, directory: Path, config: dict[str, Any], data: str, options: InferOptions) -> None:
        super().__init__()
        self._texts = open_texts(data, options.column, options.pair_column)
        self.source = self._texts.first
        kind = job_of(directory, config)
        _check_options(directory, kind, options)
        self._job = job = kind(directory, config, tokenizer_of(directory))
        if isinstance(job, Generation):
            job.new_tokens = options.max_new_tokens or job.new_tokens
        self.parallel = not job.alone
        self.title, self.window = job.title, ALONE if job.alone else WINDOW
        reserved = job.new_tokens if isinstance(job, Generation) and not config.get("is_encoder_decoder") else 0
        longest = longest_text(directory, config, options.max_length, reserved=reserved)
        self._encode = Encoder(job.tokenizer, longest, places=job.places)
        self._batching = options.batching or BatchingParams()
        self._guess = options.column is None
        self._cost: Cost | None = None
        self._budget = self._profile = 0.0

    def count(self) -> int:
        """Read every text once."""
        count = 0
        for text, _ in self.read():
            if not count and self._guess:
                _check_text(text.text, self.source.spec)
            count += 1
        self._budget = min(SECONDS, _PROFILE_SECONDS * count)
        return count

    def read(self) -> Iterator[Pair]:
        """Yield the texts."""
        return self._texts.read(self._job.tokenizer)

    def compute(
        self, session: Session, window: Sequence[Pair], totals: Totals, step: Step
    ) -> tuple[list[bytes], Totals]:
        """Compute the batches of a window, the longest texts first."""
        encoded = self._encode(window)
        places = [place for place, text in enumerate(encoded) if text.ids]
        lengths = [len(encoded[place].ids) for place in places]
        batches = self._batches(session, encoded, lengths)
        lines = [line(totals.rows + at, self._job.nothing) for at in range(len(window))]
        longest_first = sorted(batches, key=lambda batch: max(lengths[at] for at in batch), reverse=True)
        chosen = [[places[at] for at in batch] for batch in longest_first]

        def run(batch: Sequence[int]) -> list[Row]:
            return self._timed(partial(self._job.run, session, [encoded[place] for place in batch]))

        for batch, rows in zip(chosen, self.each(run, chosen), strict=True):
            for place, row in zip(batch, rows, strict=True):
                lines[place] = line(totals.rows + place, row)
            step.advance(len(batch))
        step.advance(len(window) - len(places))
        return lines, _added(totals, encoded, lengths, batches)

    def report(self, totals: Totals, before: Totals, seconds: float) -> dict[str, Any]:
        """Return how much was padding, and how fast the texts were computed; measuring costs first is not counted."""
        seconds = max(seconds - self._profile, 1e-9)
        middle, high = self._percentiles()
        return {
            "empty_texts": totals.empty,
            "truncated_texts": totals.truncated,
            "tokens": totals.tokens,
            "padded_tokens": totals.padded,
            "fill_ratio": totals.tokens / totals.padded if totals.padded else 1.0,
            "batches": totals.batches,
            "seconds": seconds,
            "profile_seconds": self._profile,
            "sequences_per_second": (totals.rows - before.rows) / seconds,
            "tokens_per_second": (totals.tokens - before.tokens) / seconds,
            "p50_batch_seconds": middle,
            "p95_batch_seconds": high,
        }

    def tell(self, totals: Totals, reporter: Reporter) -> None:
        """Say how many texts were cut, or hold nothing."""
        cut, empty, count = totals.truncated, totals.empty, totals.rows
        if cut:
            reporter.warn(f"{cut} of {count} texts were longer than what is kept of a text, and cut")
        if empty:
            reporter.note(f"{empty} of {count} texts have no tokens: their rows hold no result")

    def _batches(self, session: Session, encoded: Sequence[Encoded], lengths: Sequence[int]) -> list[list[int]]:
        """Return which texts are computed together, by their places among those that have tokens."""
        if self._job.alone:
            return [[at] for at in range(len(lengths))]
        if self._batching.batching == "dp" and self._cost is None and lengths:
            self._cost = self._measure(session, encoded, max(lengths))
        return self._batching.make(lengths, self._cost)

    def _measure(self, session: Session, encoded: Sequence[Encoded], longest: int) -> Cost:
        """Measure what batches cost, with tokens of the longest text."""
        begun = time.perf_counter()
        sample = max(encoded, key=lambda text: len(text.ids))

        def timer(lengths: Sequence[int]) -> float:
            batch = [_beginning(sample, length) for length in lengths]
            started = time.perf_counter()
            self._job.run(session, batch)
            return time.perf_counter() - started

        table = measure_costs(timer, longest=longest, size=self._batching.batch_size or SIZE, seconds=self._budget)
        self._profile = time.perf_counter() - begun
        return table


def _check_options(directory: Path, kind: type[Job], options: InferOptions) -> None:
    if options.batching is not None:
        options.batching.check()
        if kind.alone:
            raise UsageError(
                f"`{directory}` generates for one text at a time",
                where="--batching, --batch-size and --max-batch-tokens are for encoders",
                hint="leave them out",
            )
    if options.max_new_tokens is not None and not kind.alone:
        raise UsageError(
            f"`{directory}` generates no text", where=f"it gives {kind.title}", hint="leave --max-new-tokens out"
        )


def _check_text(text: str, spec: str) -> None:
    """Refuse a list of sounds that was taken for texts: its only column of text is one of paths."""
    if text.lower().endswith(".wav"):
        raise UsageError(
            f"`{spec}` names sounds, and the model reads texts",
            where=f"the first text is {text!r:.80}",
            hint="give an artifact of Whisper, or name the column that holds the text with --column",
        )


def _added(before: Totals, encoded: Sequence[Encoded], lengths: Sequence[int], batches: Sequence[list[int]]) -> Totals:
    return Totals(
        rows=before.rows + len(encoded),
        empty=before.empty + len(encoded) - len(lengths),
        truncated=before.truncated + sum(text.cut for text in encoded),
        tokens=before.tokens + sum(lengths),
        padded=before.padded + padded_tokens(list(batches), lengths),
        batches=before.batches + len(batches),
    )


def _beginning(text: Encoded, length: int) -> Encoded:
    """Return the first tokens of a text."""

    def cut(values: list[Any] | None) -> list[Any] | None:
        return None if values is None else values[:length]

    return Encoded(text.ids[:length], cut(text.types), cut(text.offsets), cut(text.special))
