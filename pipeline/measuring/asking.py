"""What is measured with which data: the task that fits, its samples, what models answer, and metrics with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...calibration.fields import Fields, first_columns, fitting, open_fields
from ...calibration.source import open_source
from ...core.errors import LlmoptError, UsageError, nearest
from ...core.progress import Reporter
from ...evaluation.gates import Measured
from ...evaluation.intervals import bootstrap, count
from ...evaluation.metrics import METRICS, metrics_of
from .language_tasks import Generate, MultipleChoice, Perplexity
from .speech_tasks import Transcribe
from .subjects import Subject
from .tasks import SOURCE, Found, Task, TaskOptions
from .text_tasks import Classify, Retrieval, Similarity

CONFIDENCE = 0.95
HARNESS = "lm-eval:"
"""Begins the name of a task of lm-evaluation-harness."""

TASKS: dict[str, type[Task]] = {
    one.name: one for one in (MultipleChoice, Generate, Transcribe, Classify, Similarity, Retrieval, Perplexity)
}
"""By name; where several fit a model and the columns of the data, the first is meant."""

_AT_ONCE = frozenset({"mean_kl", "top1_agreement"})
"""What needs the answers of both models at the same time."""


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """What to measure on which data.

    Attributes:
        data: a file, or `hf:NAME[/CONFIG][:SPLIT]`; with a task of lm-evaluation-harness a folder of tasks.
        task: its name; found from the model and the columns when None.
        columns: columns by role; the role "" stands for the text.
        samples: how they are made.
        confidence: of the intervals.
        write: a JSONL file to write what was found of each sample.
    """

    data: str | None
    task: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    samples: TaskOptions = field(default_factory=TaskOptions)
    confidence: float = CONFIDENCE
    write: Path | None = None


def choose_task(
    options: EvalOptions,
    config: Mapping[str, Any],
    *,
    sentence: bool,
    name: str,
    wanted: Sequence[str] = (),
) -> type[Task]:
    """Return the task that was asked for, or the one that model, data and wanted metrics point to.

    Of the data at most the first row is read; nothing heavy is imported for a local file that is not Parquet.

    Args:
        options: data, columns, and the task if it was named.
        config: config.json of the model.
        sentence: whether it gives embeddings of whole texts.
        name: of the model, for messages.
        wanted: metrics that the task must give.

    Raises:
        UsageError: there is none, or it cannot be told.
    """
    if options.task is not None and options.task not in TASKS:
        hint = f"{nearest(options.task, TASKS)}; or {HARNESS}NAME"
        raise UsageError(f"unknown task `{options.task}`", where=f"known: {', '.join(TASKS)}", hint=hint)
    architecture = str((config.get("architectures") or ["?"])[0])
    fit = [one for one in TASKS.values() if one.measures(config, sentence=sentence)]
    if not fit:
        raise UsageError(
            f"`{name}` cannot be measured at a task",
            where=f"config.json names {architecture}, and there is no modules.json that says how embeddings are made",
            hint="give a causal language model, one that generates text from text, Whisper, a classifier, or a "
            "sentence-transformers folder",
        )
    if options.task is not None:
        if TASKS[options.task] not in fit:
            known = ", ".join(one.name for one in fit)
            raise UsageError(
                f"`{name}` cannot be measured at {options.task}", where=architecture, hint=f"it fits: {known}"
            )
        fit = [TASKS[options.task]]
    unmet = [one for one in wanted if not any(task.name in METRICS[one].tasks for task in fit)]
    if unmet:
        can = ", ".join(dict.fromkeys(known for task in fit for known in metrics_of(task.name, source=True)))
        raise UsageError(f"`{unmet[0]}` cannot be measured of `{name}`", where=architecture, hint=f"known of it: {can}")
    fit = [task for task in fit if all(task.name in METRICS[one].tasks for one in wanted)]
    if not fit:
        raise UsageError(
            "the metrics belong to several tasks",
            where=", ".join(f"{one} ({' or '.join(METRICS[one].tasks)})" for one in wanted),
            hint="give each task data of its own: --gate-data again, in a recipe a list under `evaluation`",
        )
    return fit[0] if len(fit) == 1 else _by_columns(fit, options)


def _by_columns(fit: Sequence[type[Task]], options: EvalOptions) -> type[Task]:
    """Return the first task whose columns the data have."""
    assert options.data is not None
    named = {role: column for role, column in options.columns.items() if role}
    source = open_source(options.data)
    text = source.is_text or "" in options.columns
    columns = [] if text else first_columns(source)
    for task in fit:
        if task is Perplexity and not named:
            return task
        roles = {role.name for role in task.roles}
        if not text and named.keys() <= roles and fitting(columns, task.roles, named) is not None:
            return task
    looked = "; ".join(f"{one.name}: {', '.join(role.name for role in one.roles if role.required)}" for one in fit)
    raise UsageError(
        f"cannot tell what to measure with `{options.data}`",
        where=f"columns: {', '.join(columns) or 'none, it is plain text'}",
        hint=f"name the task with --task, and its columns with --column ROLE=NAME ({looked})",
    )


def open_data(task: type[Task], options: EvalOptions) -> Fields:
    """Return the data with the columns that a task needs; of them at most the first row is read.

    Raises:
        UsageError: a column is not there, or cannot be told; or the task does not heed what is said of its samples.
    """
    assert options.data is not None
    for name in ("length", "max_new_tokens"):
        if getattr(options.samples, name) is not None and name not in task.settings:
            known = ", ".join(other for other, one in TASKS.items() if name in one.settings)
            raise UsageError(f"{task.name} does not heed `{name}`", hint=f"leave it out: it is for {known}")
    named = {role or "text": column for role, column in options.columns.items()}
    if task is Perplexity:
        unknown = next((role for role in named if role != "text"), None)
        if unknown is not None:
            raise UsageError(f"perplexity has no column `{unknown}`", hint="name the text with --column NAME")
        column = named.get("text")
        return Fields(open_source(options.data, column), {} if column is None else {"text": (column,)})
    if "" in options.columns and "text" not in {role.name for role in task.roles}:
        roles = ", ".join(role.name for role in task.roles)
        raise UsageError(
            f"--column {options.columns['']} does not say what the column is for",
            where=f"{task.name} reads {roles}",
            hint=f"write --column {task.roles[0].name}={options.columns['']}",
        )
    return open_fields(options.data, task.roles, named)


def comparable(task: type[Task], own: Subject, source: Subject) -> str | None:
    """Return why a model and its source cannot be compared at a task, None if they can."""
    first, second = own.config.get("vocab_size"), source.config.get("vocab_size")
    if task is Perplexity and first != second:
        return f"its vocabulary has {second} tokens, the artifact's {first}"
    return None


def ask(
    task: Task, own: Subject, source: Subject | None, reporter: Reporter, wanted: Sequence[str] | None = None
) -> Found:
    """Ask a model and its source for every sample; both are in memory at once only where `wanted` needs that.

    Args:
        task: what to ask.
        own: the model.
        source: what it was made of, None to measure it alone.
        reporter: shown progress.
        wanted: the metrics that matter, all when None.
    """
    found = task.given()
    at_once = isinstance(task, Perplexity) and (wanted is None or bool(_AT_ONCE & set(wanted)))
    if source is not None and at_once:
        assert isinstance(task, Perplexity)
        session = own.open()
        try:
            other = source.open()
            try:
                with reporter.step(f"evaluating {task.title} in {own.runtime.name}", len(task)) as step:
                    return found | task.find_both([(own, session), (source, other)], step)
            finally:
                other.close()
        finally:
            session.close()
    found |= ask_one(task, own, reporter)
    if source is not None:
        found |= {SOURCE + name: values for name, values in ask_one(task, source, reporter).items()}
    return found


def ask_one(task: Task, subject: Subject, reporter: Reporter) -> Found:
    """Ask one model for every sample."""
    session = subject.open()
    of = " of the source" if subject.name == "source" else ""
    try:
        with reporter.step(f"evaluating {task.title}{of} in {subject.runtime.name}", len(task)) as step:
            return task.find(subject, session, step)
    finally:
        session.close()


def measured(task: str, found: Found, names: Sequence[str], confidence: float) -> dict[str, Measured]:
    """Return metrics with their intervals.

    Raises:
        LlmoptError: one is not a number.
    """
    columns = arrays(found)
    made: dict[str, Measured] = {}
    for name in names:
        metric = METRICS[name]
        assert metric.statistic is not None
        value = metric.statistic(columns)
        if not math.isfinite(value):
            raise LlmoptError(
                f"`{name}` is not a finite number",
                where=f"{task}: {value} over {count(columns)} samples",
                hint="look at the samples: llmopt eval ... --samples FILE",
            )
        units = None if metric.units is None else float(columns[metric.units].sum()) if metric.units else count(columns)
        interval = bootstrap(columns, metric.statistic, confidence, units=units)
        if interval is not None and metric.unit in {"share", "ratio"} and metric.units is not None:
            interval = max(interval[0], 0.0), min(interval[1], 1.0) if metric.unit == "share" else interval[1]
        made[name] = Measured(value, interval, count(columns))
    return made


def arrays(found: Found) -> dict[str, Any]:
    """Return the columns that hold numbers, as arrays."""
    import numpy as np

    return {
        name: np.asarray(values)
        for name, values in found.items()
        if values and all(isinstance(value, int | float) for value in values)
    }
