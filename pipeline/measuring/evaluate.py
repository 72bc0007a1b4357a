"""`llmopt eval`: how good a model or an artifact is at a task, in its own runtime, and against its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from ...calibration.source import open_source
from ...core.errors import LlmoptError, UsageError
from ...core.progress import Reporter
from ...core.recipe import ModelSpec
from ...evaluation.metrics import METRICS, metrics_of
from ...evaluation.perplexity import Scores
from ...models.locate import locate
from ...models.sentence import is_sentence_folder
from ..artifact import Artifact, open_artifact
from .asking import HARNESS, EvalOptions, arrays, ask, choose_task, comparable, measured, open_data
from .language_tasks import Perplexity
from .subjects import Subject, source_subject, subject_of
from .tasks import SOURCE, Found, Task, TaskOptions


def evaluate(
    path: str,
    *,
    data: str | None,
    column: str | None = None,
    length: int | None = None,
    limit: int | None = None,
    reporter: Reporter,
    options: EvalOptions | None = None,
) -> dict[str, Any]:
    """Measure a model or an artifact; an artifact of ours also against its source, if that is at hand.

    Args:
        path: a model folder, a hub id or an artifact.
        data: a file or `hf:` data set.
        column: the column that holds the text.
        length: tokens of a window of running text; see `TaskOptions`.
        limit: samples to use; all when None.
        reporter: shown progress.
        options: all of that and more; what stands above is then not looked at.

    Raises:
        UsageError: the model cannot be measured so, or the data cannot be used.
        LlmoptError: the data is damaged, or the artifact does not run.
    """
    made = options or EvalOptions(
        data, columns={} if column is None else {"": column}, samples=TaskOptions(length=length, limit=limit)
    )
    artifact = open_artifact(path)
    own = subject_of(artifact, name=path)
    if made.task is not None and made.task.startswith(HARNESS):
        from .harness import evaluate_harness

        return evaluate_harness(own, made, reporter)
    if made.data is None:
        raise UsageError("no data to measure with", hint="name a file with --data SPEC")
    kind = choose_task(made, own.config, sentence=is_sentence_folder(own.folder), name=path)
    task = kind(open_data(kind, made), own, made.samples)
    source = _source(artifact, kind, own, reporter)
    found = ask(task, own, source, reporter)
    if made.write is not None:
        write_samples(task, found, made.write, read=open_source(made.data).path)
    report: dict[str, Any] = {"path": path, "runtime": own.runtime.version(), "data": made.data, "task": task.name}
    report["samples"] = len(task)
    if isinstance(task, Perplexity):
        report |= _perplexity(found)
    return report | figures(task.name, found, made.confidence)


def _source(artifact: Artifact, task: type[Task], own: Subject, reporter: Reporter) -> Subject | None:
    """Return the model that an artifact was made of, None if there is none here."""
    if artifact.manifest is None:
        return None
    source = None
    id_ = str(artifact.manifest.source["id"])
    asked = artifact.manifest.recipe.get("model")
    spec = msgspec.convert(asked if isinstance(asked, dict) else {"id": id_}, ModelSpec)
    if not Path(id_).expanduser().exists():
        reporter.note(f"no comparison with the source: `{id_}` is not here")
        return None
    try:
        source = source_subject(locate(spec), threads=own.threads)
        obstacle = comparable(task, own, source)
    except LlmoptError as error:
        obstacle = error.what
    if obstacle is not None:
        reporter.note(f"no comparison with the source: {obstacle}")
        return None
    return source


def figures(task: str, found: Found, confidence: float) -> dict[str, Any]:
    """Return all metrics of a task as plain data; `source` is what the source has of the same."""
    source = any(name.startswith(SOURCE) for name in found)
    names = list(metrics_of(task, source=source))
    columns = arrays(found)
    of_source = {name: columns.get(SOURCE + name, values) for name, values in columns.items()}
    rows: list[dict[str, Any]] = []
    for name, one in measured(task, found, names, confidence).items():
        metric = METRICS[name]
        assert metric.statistic is not None
        low, high = one.interval or (None, None)
        beside = None if metric.source or not source else metric.statistic(of_source)
        interval = {"low": low, "high": high}
        rows.append({"metric": name, "value": one.value, **interval, "unit": metric.unit, "source": beside})
    return {"confidence": confidence, "metrics": rows}


def _perplexity(found: Found) -> dict[str, Any]:
    """Return the figures of running text with standard errors over windows."""
    scores = Scores(found["loss"], found["tokens"])
    if "kl" in found:
        scores.divergences, scores.agreements = found["kl"], found["agreement"]
        scores.reference_losses = found["source_loss"]
    return scores.report()


def write_samples(task: Task, found: Found, path: Path, *, read: Path | None) -> None:
    """Write what was found of each sample, one JSON object a line; the file appears whole.

    Raises:
        UsageError: it is the file that was read, or cannot be written.
    """
    if read is not None and path.exists() and path.samefile(read):
        raise UsageError(f"`{path}` is what is read", hint="give another file with --samples")
    lines = (
        msgspec.json.encode({"index": at, **task.shown(at), **{name: values[at] for name, values in found.items()}})
        for at in range(len(task))
    )
    part = path.with_name(f".{path.name}.partial")
    try:
        with part.open("wb") as file:
            file.writelines(line + b"\n" for line in lines)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        hint = "give the name of a file, in a folder that exists, with --samples"
        raise UsageError(f"cannot write the samples to `{path}`", where=error.strerror, hint=hint) from None
