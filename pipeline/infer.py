"""`llmopt infer`: what an artifact says of a file of texts, a row for each, in the order of the texts.

Texts are read, made into tokens, put into batches and computed window by window, so memory does not grow with the
file. A finished window is on disk; a run that was killed begins with the one after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from ..calibration.records import Document
from ..core.errors import UsageError
from ..core.progress import Reporter, Step
from ..core.runtime import Runtime, Session
from ..core.threads import cores
from ..models.locate import read_config
from ..models.outline import has_tokenizer
from ..models.text import load_tokenizer
from .artifact import Artifact, open_artifact, opened_whole
from .background import in_background
from .batching import SIZE, BatchingParams, Cost, padded_tokens
from .costs import SECONDS, measure_costs
from .jobs import Generation, Job, Row, job_of
from .journal import ENDINGS, Journal, Totals, check_file, key_of
from .output import file_records
from .texts import Encoded, Encoder, Texts, longest_text, open_texts

WINDOW = 2048
"""Texts that are sorted and batched together."""

_ALONE = 32
"""The same where each text takes long: what an interrupted run loses."""

_PROFILE_SECONDS = 0.001
"""How long costs may be measured for each text of the file."""

_MOST_PARALLEL = 8
"""Batches at a time where nothing is said: each has its intermediate results in memory."""

_Computed = tuple[list[Row], float]
"""The rows of a batch, and the seconds that it took."""


@dataclass(frozen=True, slots=True)
class InferOptions:
    """How to compute.

    Attributes:
        column: holds the text.
        pair_column: holds the second text of a pair.
        batching: which texts are computed together; None stands for the defaults.
        max_length: tokens kept of a text; as many as the model takes when None.
        max_new_tokens: tokens to generate, where text is generated.
        threads: threads to compute with, all cores when None.
        parallel: batches computed at the same time, each on its share of the threads; see `_parallel` when None.
    """

    column: str | None = None
    pair_column: str | None = None
    batching: BatchingParams | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    threads: int | None = None
    parallel: int | None = None


def infer(
    path: str, *, data: str, output: Path, options: InferOptions, force: bool, reporter: Reporter
) -> dict[str, Any]:
    """Compute every text of a file and write the rows to `output`, which appears whole or not at all.

    Args:
        path: an artifact, or a folder that a runtime opens.
        data: a file of texts.
        output: the JSONL file to write.
        options: how.
        force: replace the file if it exists.
        reporter: shown progress.

    Returns:
        What was computed and how fast.

    Raises:
        UsageError: the artifact, the file or the options cannot be used.
        LlmoptError: a row holds no text, or the artifact does not run.
    """
    artifact = open_artifact(path)
    texts = open_texts(data, options.column, options.pair_column)
    assert texts.first.path is not None
    check_file(output, force=force, source=texts.first.path)
    job, encoder = _prepare(artifact, options)
    count = _count(texts, job.tokenizer, reporter)
    journal = Journal(output, _key(artifact, texts, output, options))
    if journal.resume():
        reporter.note(f"what an earlier run left at {output}.partial was made from something else: begun anew")
    done = journal.totals.texts
    if done:
        reporter.note(f"{done} of {count} texts were computed by an earlier run")
    runtime = artifact.runtime()
    parallel = _parallel(runtime, job, options)
    session = opened_whole(runtime, artifact.directory, threads=options.threads, parallel=parallel)
    try:
        with (
            reporter.step(f"computing {job.title} in {runtime.name}", count) as step,
            ThreadPoolExecutor(parallel) as pool,
        ):
            step.advance(done)
            budget = min(SECONDS, _PROFILE_SECONDS * count)
            each = pool.map if parallel > 1 else map
            run = _Run(session, job, encoder, options.batching or BatchingParams(), step, journal, budget, each)
            for window in _windows(islice(texts.read(job.tokenizer), done, None), _ALONE if job.alone else WINDOW):
                run.window(window)
        journal.finish()
    finally:
        session.close()
    _tell(journal.totals, reporter)
    about = {"path": path, "runtime": runtime.version(), "output": str(output), "results": job.title}
    about |= {"parallel_batches": parallel}
    return {**about, "texts": journal.totals.texts, "resumed_texts": done, **run.report()}


def _prepare(artifact: Artifact, options: InferOptions) -> tuple[Job, Encoder]:
    """Refuse what cannot work, and load the tokenizer."""
    artifact.runtime()
    directory = artifact.directory
    if not (directory / "config.json").is_file():
        hint = "give an artifact of llmopt, or put the model's config.json beside the graph"
        raise UsageError(f"`{directory}` does not say what it does", where="there is no config.json", hint=hint)
    config = read_config(directory)
    kind = job_of(directory, config)
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
    if not has_tokenizer(directory):
        raise UsageError(
            f"`{directory}` has no tokenizer",
            where="texts are read with the model's own",
            hint="put tokenizer.json and tokenizer_config.json beside the graph",
        )
    job = kind(directory, config, load_tokenizer(directory))
    if isinstance(job, Generation):
        job.new_tokens = options.max_new_tokens or job.new_tokens
    reserved = job.new_tokens if isinstance(job, Generation) and not config.get("is_encoder_decoder") else 0
    longest = longest_text(directory, config, options.max_length, reserved=reserved)
    return job, Encoder(job.tokenizer, longest, places=job.places)


def _parallel(runtime: Runtime, job: Job, options: InferOptions) -> int:
    """Return how many batches to compute at the same time: where they can be, one for each thread, up to eight.

    A batch on one core wastes nothing on waiting for the other cores, so several of them side by side are faster.

    Raises:
        UsageError: more were asked for than there can be.
    """
    threads = options.threads or cores()
    able = runtime.parallel and not job.alone
    if options.parallel is None:
        return min(threads, _MOST_PARALLEL) if able else 1
    if options.parallel > 1 and not able:
        reason = f"it gives {job.title}, one after the other" if job.alone else f"{runtime.name} computes one at a time"
        raise UsageError("batches cannot be computed side by side here", where=reason, hint="leave --parallel out")
    if options.parallel > threads:
        where = f"--parallel {options.parallel}, with {threads} thread{'s' if threads > 1 else ''}"
        raise UsageError("there are more batches at a time than threads", where=where, hint=f"use --parallel {threads}")
    return options.parallel


def _count(texts: Texts, tokenizer: Any, reporter: Reporter) -> int:
    """Read the whole file once: what is wrong with it is found before anything is computed."""
    with reporter.step(f"reading {texts.first.label}", 1) as step:
        count = sum(1 for _ in texts.read(tokenizer))
        step.advance(detail=f"{count} texts")
    if not count:
        raise UsageError(f"`{texts.first.spec}` holds no texts", hint="name a file with texts in it")
    return count


def _key(artifact: Artifact, texts: Texts, output: Path, options: InferOptions) -> Callable[[], str]:
    """Return a function that tells what the results are made from; files are hashed beside the work."""

    def key() -> str:
        own = frozenset({output.name, *(f"{output.name}{ending}" for ending in ENDINGS)})  # it may lie in there
        records = file_records(artifact.directory, skip=own)
        parts = {
            "llmopt": version("llmopt"),
            "runtime": artifact.runtime().version(),
            "artifact": {name: record.sha256 for name, record in records.items()},
            "input": texts.first.sha256(),
            "columns": [options.column, options.pair_column],
            "batching": msgspec.to_builtins(options.batching),
            "tokens": [options.max_length, options.max_new_tokens],
            "window": WINDOW,
        }
        return key_of(parts)

    return in_background(key)


def _windows(
    texts: Iterator[tuple[Document, Document | None]], size: int
) -> Iterator[list[tuple[Document, Document | None]]]:
    while window := list(islice(texts, size)):
        yield window


@dataclass(slots=True)
class _Run:
    """The windows of one run, and how long their batches took.

    Attributes:
        session: the artifact, opened.
        job: what is computed.
        encoder: makes tokens of texts.
        batching: which texts are computed together.
        step: told of every batch.
        journal: given the rows.
        budget: seconds that costs may be measured for.
        each: calls a function with each batch, some at the same time, and gives what it returns in their order.
    """

    session: Session
    job: Job
    encoder: Encoder
    batching: BatchingParams
    step: Step
    journal: Journal
    budget: float
    each: Callable[[Callable[[list[int]], _Computed], list[list[int]]], Iterable[_Computed]]
    _cost: Cost | None = None
    _profile: float = 0.0
    _latencies: list[float] = field(default_factory=list[float])
    _before: Totals = field(default_factory=Totals)
    _began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._before = msgspec.structs.replace(self.journal.totals)

    def window(self, texts: Sequence[tuple[Document, Document | None]]) -> None:
        """Compute one window and write its rows."""
        encoded = self.encoder(texts)
        places = [place for place, text in enumerate(encoded) if text.ids]
        lengths = [len(encoded[place].ids) for place in places]
        if self.batching.batching == "dp" and self._cost is None and lengths and not self.job.alone:
            self._cost = self._measure(encoded, max(lengths))
        batches = [[at] for at in range(len(places))] if self.job.alone else self.batching.make(lengths, self._cost)
        first = self.journal.totals.texts
        lines = [self._line(first + at, self.job.nothing) for at in range(len(texts))]

        def compute(chosen: list[int]) -> _Computed:
            begun = time.perf_counter()
            rows = self.job.run(self.session, [encoded[place] for place in chosen])
            return rows, time.perf_counter() - begun

        longest_first = sorted(batches, key=lambda batch: max(lengths[at] for at in batch), reverse=True)
        chosen = [[places[at] for at in batch] for batch in longest_first]
        for batch, (rows, seconds) in zip(chosen, self.each(compute, chosen), strict=True):
            self._latencies.append(seconds)
            for place, row in zip(batch, rows, strict=True):
                lines[place] = self._line(first + place, row)
            self.step.advance(len(batch))
        self.step.advance(len(texts) - len(places))
        self.journal.append(lines, self._added(encoded, lengths, batches))

    def report(self) -> dict[str, Any]:
        """Return the figures: counts of the whole file, speeds of this run."""
        import numpy as np

        totals, seconds = self.journal.totals, max(time.perf_counter() - self._began - self._profile, 1e-9)
        middle, high = np.percentile(self._latencies, [50, 95]) if self._latencies else (0.0, 0.0)
        return {
            "empty_texts": totals.empty,
            "truncated_texts": totals.truncated,
            "tokens": totals.tokens,
            "padded_tokens": totals.padded,
            "fill_ratio": totals.tokens / totals.padded if totals.padded else 1.0,
            "batches": totals.batches,
            "seconds": seconds,
            "profile_seconds": self._profile,
            "sequences_per_second": (totals.texts - self._before.texts) / seconds,
            "tokens_per_second": (totals.tokens - self._before.tokens) / seconds,
            "p50_batch_seconds": float(middle),
            "p95_batch_seconds": float(high),
        }

    def _measure(self, encoded: Sequence[Encoded], longest: int) -> Cost:
        """Measure what batches cost, with tokens of the longest text."""
        begun = time.perf_counter()
        sample = max(encoded, key=lambda text: len(text.ids))

        def timer(lengths: Sequence[int]) -> float:
            batch = [_beginning(sample, length) for length in lengths]
            started = time.perf_counter()
            self.job.run(self.session, batch)
            return time.perf_counter() - started

        table = measure_costs(timer, longest=longest, size=self.batching.batch_size or SIZE, seconds=self.budget)
        self._profile = time.perf_counter() - begun
        return table

    def _added(self, encoded: Sequence[Encoded], lengths: Sequence[int], batches: Sequence[list[int]]) -> Totals:
        before = self.journal.totals
        return Totals(
            texts=before.texts + len(encoded),
            empty=before.empty + len(encoded) - len(lengths),
            truncated=before.truncated + sum(text.cut for text in encoded),
            tokens=before.tokens + sum(lengths),
            padded=before.padded + padded_tokens(list(batches), lengths),
            batches=before.batches + len(batches),
        )

    @staticmethod
    def _line(index: int, row: dict[str, Any]) -> bytes:
        return msgspec.json.encode({"index": index, **row})


def _beginning(text: Encoded, length: int) -> Encoded:
    """Return the first tokens of a text."""

    def cut(values: list[Any] | None) -> list[Any] | None:
        return None if values is None else values[:length]

    return Encoded(text.ids[:length], cut(text.types), cut(text.offsets), cut(text.special))


def _tell(totals: Totals, reporter: Reporter) -> None:
    if totals.truncated:
        reporter.warn(f"{totals.truncated} of {totals.texts} texts were longer than what is kept of a text, and cut")
    if totals.empty:
        reporter.note(f"{totals.empty} of {totals.texts} texts have no tokens: their rows hold no result")
