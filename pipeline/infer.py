"""`llmopt infer`: what an artifact makes of the rows of a file, a line for each, in their order.

Rows are read and computed window by window, so memory does not grow with the file. A finished window is on disk; a run
that was killed begins with the one after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from ..core.digests import files_sha256
from ..core.errors import UsageError
from ..core.progress import Reporter
from ..core.runtime import Runtime
from ..core.threads import cores
from ..models.locate import read_config
from ..models.speech import is_speech
from .artifact import Artifact, open_artifact, opened_whole
from .background import in_background
from .inference import Inference, InferOptions
from .journal import ENDINGS, Journal, check_file, key_of
from .output import file_records
from .sound_inference import SoundInference
from .text_inference import TextInference

_MOST_PARALLEL = 8
"""Batches at a time where nothing is said: each has its intermediate results in memory."""


def infer(
    path: str, *, data: str, output: Path, options: InferOptions, force: bool, reporter: Reporter
) -> dict[str, Any]:
    """Compute every row of a file and write the results to `output`, which appears whole or not at all.

    Args:
        path: an artifact, or a folder that a runtime opens.
        data: a file of texts, or one that names sounds.
        output: the JSONL file to write.
        options: how.
        force: replace the file if it exists.
        reporter: shown progress.

    Returns:
        What was computed and how fast.

    Raises:
        UsageError: the artifact, the file or the options cannot be used.
        LlmoptError: a row cannot be used, or the artifact does not run.
    """
    artifact = open_artifact(path)
    work = _inference(artifact, data, options)
    check_file(output, force=force, sources=work.files())
    count = _count(work, reporter)
    journal = Journal(output, _key(artifact, work, output, options))
    if journal.resume():
        reporter.note(f"what an earlier run left at {output}.partial was made from something else: begun anew")
    before = journal.totals
    if before.rows:
        reporter.note(f"{before.rows} of {count} {work.rows} were computed by an earlier run")
    runtime = artifact.runtime()
    parallel = _parallel(runtime, work, options)
    session = opened_whole(runtime, artifact.directory, threads=options.threads, parallel=parallel)
    try:
        with (
            reporter.step(f"computing {work.title} in {runtime.name}", count) as step,
            ThreadPoolExecutor(parallel) as pool,
        ):
            work.each = pool.map if parallel > 1 else map
            step.advance(before.rows)
            begun = time.perf_counter()
            rows = islice(work.read(), before.rows, None)
            while window := list(islice(rows, work.window)):
                journal.append(*work.compute(session, window, journal.totals, step))
            seconds = max(time.perf_counter() - begun, 1e-9)
        journal.finish()
    finally:
        session.close()
    work.tell(journal.totals, reporter)
    about = {"path": path, "runtime": runtime.version(), "output": str(output), "results": work.title}
    counts = {work.rows: journal.totals.rows, f"resumed_{work.rows}": before.rows}
    return {**about, **counts, "parallel_batches": parallel, **work.report(journal.totals, before, seconds)}


def _inference(artifact: Artifact, data: str, options: InferOptions) -> Inference:
    """Refuse what cannot work, and load the tokenizer."""
    artifact.runtime()
    directory = artifact.directory
    if not (directory / "config.json").is_file():
        hint = "give an artifact of llmopt, or put the model's config.json beside the graph"
        raise UsageError(f"`{directory}` does not say what it does", where="there is no config.json", hint=hint)
    config = read_config(directory)
    kind = SoundInference if is_speech(config) else TextInference
    return kind(directory, config, data, options)


def _parallel(runtime: Runtime, work: Inference, options: InferOptions) -> int:
    """Return how many batches to compute at the same time: where they can be, one for each thread, up to eight.

    A batch on one core wastes nothing on waiting for the other cores, so several of them side by side are faster.

    Raises:
        UsageError: more were asked for than there can be.
    """
    threads = options.threads or cores()
    able = runtime.parallel and work.parallel
    if options.parallel is None:
        return min(threads, _MOST_PARALLEL) if able else 1
    if options.parallel > 1 and not able:
        reason = f"{runtime.name} computes one at a time" if work.parallel else f"{work.title} is made one by one"
        raise UsageError("batches cannot be computed side by side here", where=reason, hint="leave --parallel out")
    if options.parallel > threads:
        where = f"--parallel {options.parallel}, with {threads} thread{'s' if threads > 1 else ''}"
        raise UsageError("there are more batches at a time than threads", where=where, hint=f"use --parallel {threads}")
    return options.parallel


def _count(work: Inference, reporter: Reporter) -> int:
    with reporter.step(f"reading {work.source.label}", 1) as step:
        count = work.count()
        step.advance(detail=f"{count} {work.rows}")
    if not count:
        raise UsageError(f"`{work.source.spec}` holds no {work.rows}", hint=f"name a file with {work.rows} in it")
    return count


def _key(artifact: Artifact, work: Inference, output: Path, options: InferOptions) -> Callable[[], str]:
    """Return a function that tells what the results are made from; files are hashed beside the work."""

    def key() -> str:
        own = frozenset({output.name, *(f"{output.name}{ending}" for ending in ENDINGS)})  # it may lie in there
        records = file_records(artifact.directory, skip=own)
        parts = {
            "llmopt": version("llmopt"),
            "runtime": artifact.runtime().version(),
            "artifact": {name: record.sha256 for name, record in records.items()},
            "input": files_sha256((path.name, path) for path in work.files()),
            "columns": [options.column, options.pair_column],
            "batching": msgspec.to_builtins(options.batching),
            "tokens": [options.max_length, options.max_new_tokens],
            "window": work.window,
        }
        return key_of(parts)

    return in_background(key)
