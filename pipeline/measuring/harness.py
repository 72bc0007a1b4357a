"""Tasks of lm-evaluation-harness through its own package: the artifact answers in its own runtime.

Gao et al., "A framework for few-shot language model evaluation". What is a model to the harness is an open session
here; prompts, few-shot examples, answers and metrics are the harness's.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import msgspec

from ...core.errors import LlmoptError, UsageError, nearest
from ...core.progress import Reporter
from ...core.runtime import Session
from ...evaluation.intervals import bootstrap
from ...models.locate import context_length
from ..jobs import Generation
from ..texts import Encoded
from .asking import HARNESS, EvalOptions
from .likelihoods import continuation, log_likelihoods, token_ids
from .subjects import Subject
from .tasks import is_causal

_PIECE = 32
"""Tokens that are generated before a look at what ends an answer."""

_NEW_TOKENS = 256


def evaluate_harness(own: Subject, options: EvalOptions, reporter: Reporter) -> dict[str, Any]:
    """Measure a model at one task of the harness.

    Args:
        own: the model.
        options: the task, `lm-eval:NAME`; its data may name a folder with tasks in YAML, or such a file.
        reporter: shown progress.

    Returns:
        The report: every figure of the harness, with an interval.

    Raises:
        UsageError: the package is not installed, the model generates no text, or there is no such task.
        LlmoptError: the task's data cannot be had, or it asks for something that a session does not do.
    """
    assert options.task is not None
    _refuse_unheeded(options)
    name = options.task.removeprefix(HARNESS)
    if find_spec("lm_eval") is None:
        raise UsageError(
            f"`{options.task}` needs the package lm_eval", where="it is not installed", hint="pip install lm_eval"
        )
    if not is_causal(own.config):
        raise UsageError(f"`{own.name}` is no causal language model", where=own.architecture, hint="leave --task out")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("TQDM_DISABLE", "1")
    manager = _manager(options.data)
    if name not in manager.all_tasks:
        hint = f"{nearest(name, manager.all_tasks)[:200]}; --data DIR adds tasks of your own, in YAML"
        raise UsageError(f"lm_eval has no task `{name}`", where=f"{len(manager.all_tasks)} tasks", hint=hint)
    session = own.open()
    try:
        with reporter.step(f"evaluating {name} in {own.runtime.name}", 1) as step:
            made = _run(_model(own, session), name, manager, options)
            step.advance()
    finally:
        session.close()
    samples = cast("Mapping[str, list[dict[str, Any]]]", made.get("samples", {}))
    if options.write is not None:
        _write(samples, options.write)
    rows = [row for task, found in made["results"].items() for row in _rows(task, found, samples, options.confidence)]
    package = importlib.import_module("importlib.metadata").version("lm_eval")
    return {
        "path": own.name,
        "runtime": own.runtime.version(),
        "data": f"lm_eval {package}",
        "task": options.task,
        "samples": sum(map(len, samples.values())),
        "confidence": options.confidence,
        "metrics": rows,
    }


def _refuse_unheeded(options: EvalOptions) -> None:
    """Refuse what the harness's own tasks say."""
    given = {
        "column": options.columns,
        "length": options.samples.length,
        "max-new-tokens": options.samples.max_new_tokens,
    }
    for name, value in given.items():
        if value:
            raise UsageError(f"--{name} does not apply to `{options.task}`", hint="the task's own file says it")


def _manager(data: str | None) -> Any:
    """Return the harness's list of tasks, with those of a folder."""
    folder = None if data is None else Path(data).expanduser()
    if folder is not None and not folder.exists():
        raise UsageError(
            f"no folder of tasks at `{data}`", hint="name a folder with tasks in YAML, or leave --data out"
        )
    if folder is not None and folder.is_file():
        folder = folder.parent
    tasks = importlib.import_module("lm_eval.tasks")
    return tasks.TaskManager(include_path=None if folder is None else str(folder.resolve()))


def _run(model: Any, name: str, manager: Any, options: EvalOptions) -> dict[str, Any]:
    evaluator = importlib.import_module("lm_eval.evaluator")
    try:
        return evaluator.simple_evaluate(
            model=model,
            tasks=[name],
            task_manager=manager,
            limit=options.samples.limit,
            bootstrap_iters=1000,
            log_samples=True,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise LlmoptError(
            f"lm_eval cannot run the task `{name}`",
            where=f"{type(error).__name__}: {error}"[:500],
            hint="most tasks fetch their data from the hub; a task in YAML may name local files: `dataset_path: json`",
        ) from error


def _rows(
    task: str, found: Mapping[str, Any], samples: Mapping[str, list[dict[str, Any]]], confidence: float
) -> list[dict[str, Any]]:
    """Return the figures of one task. An interval rests on its samples where the figure is their mean."""
    rows: list[dict[str, Any]] = []
    for key, value in found.items():
        metric, _, chosen = key.partition(",")
        if not isinstance(value, int | float) or metric.endswith("_stderr") or not chosen:
            continue
        values = [
            sample[metric]
            for sample in samples.get(task, ())
            if sample.get("filter", chosen) == chosen and isinstance(sample.get(metric), int | float)
        ]
        low, high = _interval(values, float(value), confidence) or (None, None)
        label = metric if chosen == "none" else f"{metric} ({chosen})"
        interval = {"low": low, "high": high}
        rows.append({"metric": f"{task} {label}", "value": float(value), **interval, "unit": "", "source": None})
    return rows


def _interval(values: Sequence[float], value: float, confidence: float) -> tuple[float, float] | None:
    import numpy as np

    columns = {"value": np.asarray(values, np.float64)}
    if not values or abs(float(columns["value"].mean()) - value) > 1e-9:
        return None
    units = len(values) if set(values) <= {0, 1} else None
    interval = bootstrap(columns, lambda made: float(made["value"].mean()), confidence, units=units)
    if interval is None or units is None:
        return interval
    return max(interval[0], 0.0), min(interval[1], 1.0)


def _write(samples: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    def plain(value: Any) -> Any:
        item = getattr(value, "item", None)
        return item() if callable(item) else str(value)

    rows = ({"task": task, **sample} for task, found in samples.items() for sample in found)
    try:
        path.write_bytes(b"".join(msgspec.json.encode(row, enc_hook=plain) + b"\n" for row in rows))
    except OSError as error:
        hint = "give the name of a file, in a folder that exists, with --samples"
        raise UsageError(f"cannot write the samples to `{path}`", where=error.strerror, hint=hint) from None


def _model(own: Subject, session: Session) -> Any:
    """Return the session as what the harness calls a model."""
    base: Any = importlib.import_module("lm_eval.api.model").LM
    answers = _Answers(own, session)

    def requests(method: str) -> Any:
        def ask(_: Any, given: Sequence[Any]) -> Any:
            return getattr(answers, method)([request.args for request in given])

        return ask

    members = {name: requests(name) for name in ("loglikelihood", "loglikelihood_rolling", "generate_until")}
    return type("SessionModel", (base,), members)()


class _Answers:
    """What the harness asks of a model: likelihoods, and text up to a word that ends it."""

    def __init__(self, own: Subject, session: Session) -> None:
        self._own, self._session = own, session

    def loglikelihood(self, given: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the likeliest one."""
        texts: list[tuple[Encoded, int]] = []
        for context, text in given:
            kept = context.rstrip()  # spaces go to the continuation, where tokenizers put them
            texts.append(continuation(self._own, kept, context[len(kept) :] + text))
        return log_likelihoods(self._own, self._session, texts)

    def loglikelihood_rolling(self, given: Sequence[tuple[str]]) -> list[float]:
        """Return the log-likelihood of whole texts, each token predicted once, in windows of the whole context."""
        utils: Any = importlib.import_module("lm_eval.utils")
        tokenizer = self._own.tokenizer()
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        longest = context_length(self._own.config) or 2048
        totals: list[float] = []
        for (text,) in given:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            windows = utils.get_rolling_token_windows(ids, int(begin or 0), longest - 1, 1)
            pairs = [utils.make_disjoint_window(window) for window in windows]
            rows = [(Encoded([*context, *wanted]), len(context)) for context, wanted in pairs]
            totals.append(sum(score for score, _ in log_likelihoods(self._own, self._session, rows)))
        return totals

    def generate_until(self, given: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Continue texts greedily, up to what ends an answer.

        Raises:
            LlmoptError: the task wants text to be drawn at random.
        """
        return [self._generated(context, settings) for context, settings in given]

    def _generated(self, context: str, settings: Mapping[str, Any]) -> str:
        if settings.get("do_sample") and float(settings.get("temperature", 1)) > 0:
            raise LlmoptError("the task draws its answers at random", where=str(dict(settings)), hint="take another")
        written: Any = settings.get("until") or []
        until = [written] if isinstance(written, str) else [str(one) for one in written]
        most = int(settings.get("max_gen_toks", settings.get("max_new_tokens", _NEW_TOKENS)))
        job = Generation(self._own.directory, self._own.config, self._own.tokenizer())
        room = context_length(self._own.config)
        prompt = token_ids(self._own, context)
        prompt = prompt if room is None else prompt[-max(1, room - most) :]
        made: list[int] = []
        text = ""
        while len(made) < most:
            made += self._session.generate([*prompt, *made], min(_PIECE, most - len(made)))
            text, ended = job.text(made)
            cuts = [at for one in until if one and (at := text.find(one)) >= 0]
            if cuts or ended:
                return text[: min(cuts)] if cuts else text
        return text
