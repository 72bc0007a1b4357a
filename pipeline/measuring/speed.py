"""Load time, memory and speed for gates: an artifact and its source measured in turns, every figure several times."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from ...core.errors import LlmoptError
from ...core.progress import Reporter, Step
from ...evaluation.gates import Measured
from ...evaluation.intervals import bootstrap
from ...models.locate import context_length
from ..bench import Texts, Worker, working
from .subjects import Subject

_PROMPT, _NEW = 128, 32
_FIGURES = {
    "load_seconds": "load_seconds",
    "load_ratio": "load_seconds",
    "peak_memory": "peak_memory_bytes",
    "peak_memory_ratio": "peak_memory_bytes",
    "prefill_speed": "prefill_tokens_per_second",
    "prefill_speedup": "prefill_tokens_per_second",
    "decode_speed": "decode_tokens_per_second",
    "decode_speedup": "decode_tokens_per_second",
    "throughput": "sequences_per_second",
    "throughput_speedup": "sequences_per_second",
}
"""By metric: the figure of a measurement. Names that end in ratio or speedup divide it by the source's."""

_FRESH = frozenset({"load_seconds", "peak_memory_bytes"})
"""Figures that a process has only one of."""


def against_source(name: str) -> bool:
    """Return whether a metric of speed is a quotient of two models."""
    return name.endswith(("_ratio", "_speedup"))


def measure_speed(
    own: Subject,
    source: Subject | None,
    names: Sequence[str],
    *,
    repeats: int,
    confidence: float,
    reporter: Reporter,
) -> dict[str, Measured]:
    """Return metrics of speed, load time and memory as medians over repeats, with their intervals.

    Each repeat measures every model once, one straight after the other, so that what else the machine does hits both;
    a quotient is made of such a pair. Load time and memory take a new process for every repeat.

    Args:
        own: the artifact.
        source: what it is compared with; only needed for metrics against it.
        names: the metrics.
        repeats: how often; one more round, the first, is not counted for speeds.
        confidence: of the intervals.
        reporter: shown progress.

    Raises:
        LlmoptError: one of them does not load or does not run.
    """
    options = _options(own)
    fresh = _subjects(own, source, [name for name in names if _FIGURES[name] in _FRESH])
    running = _subjects(own, source, [name for name in names if _FIGURES[name] not in _FRESH])
    total = repeats * len(fresh) + (repeats + 1) * len(running)
    rounds: list[list[dict[str, Any]]] = [[{}, {}] for _ in range(repeats)]
    with reporter.step("measuring load time, memory and speed for the gates", total) as step:
        for one in rounds:
            for figures, subject in zip(one, fresh, strict=False):
                figures.update(_fresh(subject, options))
                step.advance(detail=subject.name)
        for one, made in zip(rounds, _speeds(running, options, repeats, step), strict=True):
            for figures, more in zip(one, made, strict=False):
                figures.update(more)
    return {name: _measured(name, rounds, confidence) for name in names}


def _subjects(own: Subject, source: Subject | None, names: Sequence[str]) -> list[Subject]:
    """Return the models that metrics need."""
    if source is not None and any(against_source(name) for name in names):
        return [own, source]
    return [own] if names else []


def _options(own: Subject) -> dict[str, Any]:
    """Return how much text is read and generated: as `llmopt bench`, or what the context has room for."""
    context = context_length(own.config) or _PROMPT + _NEW + 2
    room = max(3, context - 2)
    new = min(_NEW, room // 3)
    return {"prompt_tokens": min(_PROMPT, room - new - 1), "new_tokens": new, "threads": own.threads}


def _working(subject: Subject, options: dict[str, Any]) -> AbstractContextManager[Worker]:
    if subject.graph is not None and subject.graph.name != "model.onnx":
        raise LlmoptError(
            f"the speed of `{subject.graph}` cannot be measured",
            where="a process of its own loads a folder with model.onnx",
            hint="rename it to model.onnx",
        )
    return working(subject.directory, subject.runtime, options, Texts([]))


def _fresh(subject: Subject, options: dict[str, Any]) -> dict[str, Any]:
    """Load a model in a new process, let it compute once, and return load time and peak memory."""
    with _working(subject, options) as worker:
        worker.measure()
        return {"load_seconds": worker.load_seconds, "peak_memory_bytes": worker.peak_memory_bytes()}


def _speeds(
    subjects: Sequence[Subject], options: dict[str, Any], repeats: int, step: Step
) -> list[list[dict[str, Any]]]:
    if not subjects:
        return [[] for _ in range(repeats)]
    with ExitStack() as stack:
        workers = [stack.enter_context(_working(subject, options)) for subject in subjects]
        rounds: list[list[dict[str, Any]]] = []
        for _ in range(repeats + 1):
            rounds.append([worker.measure() for worker in workers])
            step.advance(len(workers))
        return rounds[1:]


def _measured(name: str, rounds: Sequence[Sequence[dict[str, Any]]], confidence: float) -> Measured:
    import numpy as np

    figure = _FIGURES[name]
    if figure not in rounds[0][0]:
        raise LlmoptError(f"`{name}` cannot be measured of this model", where=f"measured: {', '.join(rounds[0][0])}")
    value: Callable[[Sequence[dict[str, Any]]], float] = lambda pair: float(pair[0][figure])  # noqa: E731
    if against_source(name):
        value = lambda pair: float(pair[0][figure]) / float(pair[1][figure])  # noqa: E731
    values = [value(pair) for pair in rounds]
    interval = bootstrap({"value": np.asarray(values)}, lambda columns: float(np.median(columns["value"])), confidence)
    return Measured(statistics.median(values), interval, len(values))
