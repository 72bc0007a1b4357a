"""`llmopt eval`: how well a model or an artifact predicts text, in its own runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..calibration.windows import load_windows
from ..core.errors import UsageError
from ..core.progress import Reporter
from ..core.runtime import Session
from ..evaluation.perplexity import Scores
from ..models.locate import context_length, read_config
from ..models.text import load_tokenizer
from ..runtimes import RUNTIMES
from .artifact import Artifact, open_artifact

_LOGITS_PER_BATCH = 1 << 24
"""Logits of one batch, 64 MiB in float32."""


def evaluate(
    path: str, *, data: str, column: str | None, length: int, limit: int | None, reporter: Reporter
) -> dict[str, Any]:
    """Measure perplexity; for an artifact of ours also KL and top-1 agreement against its source, if that is at hand.

    Args:
        path: a model folder, a hub id or an artifact.
        data: a text file or `hf:` data set.
        column: the column that holds the text.
        length: tokens of a window.
        limit: windows to use; all when None.
        reporter: shown progress.

    Raises:
        UsageError: the path is no causal language model, or the data cannot be used.
    """
    artifact = open_artifact(path)
    runtime = artifact.runtime()
    config = read_config(artifact.directory)
    architecture = (config.get("architectures") or ["?"])[0]
    if not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise UsageError(
            f"perplexity is of causal language models, `{path}` is {architecture}",
            hint="give a model whose architecture ends in ForCausalLM",
        )
    tokenizer = load_tokenizer(artifact.directory)
    windows = load_windows(data, column, tokenizer, length=length, limit=limit)
    _check_context(config, max(len(row) for row in windows.rows), path)
    source = _source(artifact, reporter)
    sessions = [runtime.open(artifact.directory)]
    if source is not None:
        sessions.append(RUNTIMES.load("transformers")().open(source))
    scores = Scores()
    try:
        with reporter.step(f"evaluating in {runtime.name}", len(windows.rows)) as step:
            for batch in _batches(windows.rows, int(config.get("vocab_size", 1 << 16))):
                _score(scores, batch, sessions)
                step.advance(len(batch), detail=f"{sum(scores.tokens)} tokens")
    finally:
        for session in sessions:
            session.close()
    return {"path": path, "runtime": runtime.version(), "data": windows.source, **scores.report()}


def _source(artifact: Artifact, reporter: Reporter) -> Path | None:
    """Return the folder of the model that an artifact was made of, None if there is none here."""
    if artifact.manifest is None:
        return None
    folder = Path(str(artifact.manifest.source["id"])).expanduser()
    if (folder / "config.json").is_file():
        return folder
    reporter.note(f"no comparison with the source: `{artifact.manifest.source['id']}` is not here")
    return None


def _check_context(config: dict[str, Any], longest: int, path: str) -> None:
    context = context_length(config)
    if context is not None and longest > context:
        raise UsageError(
            f"a window of {longest} tokens is longer than the context of `{path}`",
            where=f"config.json says {context}",
            hint=f"use --length {context - 1} or less",
        )


def _batches(rows: Sequence[list[int]], vocabulary: int) -> Iterator[list[list[int]]]:
    """Yield rows of one length together, as many as keep the logits small."""
    batch: list[list[int]] = []
    for row in rows:
        full = batch and (len(batch) + 1) * len(row) * vocabulary > _LOGITS_PER_BATCH
        if batch and (full or len(batch[0]) != len(row)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _score(scores: Scores, batch: list[list[int]], sessions: Sequence[Session]) -> None:
    import numpy as np

    ids = np.array(batch, dtype=np.int64)
    logits = [session.outputs({"input_ids": ids})["logits"] for session in sessions]
    scores.add(ids, logits[0], logits[1] if len(logits) > 1 else None)
