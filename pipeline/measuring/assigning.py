"""Which gate is measured with which test data: refused in the plan where it cannot be told, or nothing uses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ...core.errors import UsageError, nearest
from ...core.recipe import EvaluationSpec, Recipe
from ...evaluation.gates import Gate, parse_gate
from .asking import HARNESS, EvalOptions, choose_task
from .tasks import Task, TaskOptions

_HEEDED = (
    "`repeats` is for gates on speed, and among several evaluations stands in the one without `data`; the rest is for "
    "gates on quality, beside `data`; `confidence` for both"
)


@dataclass(frozen=True, slots=True)
class Assigned:
    """Test data, and what is measured with them.

    Attributes:
        name: how gates call them.
        options: the data, and how they are read.
        task: what the model is asked.
        gates: those that are measured so.
    """

    name: str
    options: EvalOptions
    task: type[Task]
    gates: tuple[Gate, ...]


def gates_of_recipe(recipe: Recipe) -> list[Gate]:
    """Return a recipe's gates.

    Raises:
        UsageError: one cannot be read.
    """
    return [parse_gate(text, where="gates") for text in recipe.gates]


def speed_spec(recipe: Recipe) -> EvaluationSpec:
    """Return how speed is measured: as the only evaluation says, of several the one without data."""
    specs = recipe.evaluation if len(recipe.evaluation) == 1 else [one for one in recipe.evaluation if one.data is None]
    return specs[0] if specs else EvaluationSpec()


def assigned(recipe: Recipe, config: dict[str, Any], *, sentence: bool, model: str) -> list[Assigned]:
    """Return the test data with the gates on quality that each is for.

    A gate is measured with all data whose task gives its metric, or with those alone that it names. The task of an
    evaluation is the one that it names, or follows from the model, the columns, and the gates that are for it alone.

    Args:
        recipe: its gates and evaluations.
        config: config.json of the model.
        sentence: whether it gives embeddings of whole texts.
        model: its name, for messages.

    Raises:
        UsageError: a gate has no data, or data have no gate.
    """
    gates = [gate for gate in gates_of_recipe(recipe) if gate.metric.group == "quality"]
    specs = [spec for spec in recipe.evaluation if spec.data is not None]
    _check_names(gates, [spec.label for spec in specs])
    found: list[Assigned] = []
    for spec in specs if gates else ():
        options = _options(spec)
        own = gates if len(specs) == 1 else [gate for gate in gates if gate.evaluation == spec.label]
        task = choose_task(options, config, sentence=sentence, name=model, wanted=[gate.name for gate in own])
        given = [gate for gate in gates if gate.evaluation in {None, spec.label} and task.name in gate.metric.tasks]
        found.append(Assigned(spec.label, options, task, tuple(given)))
    _check_all_used(gates, found)
    return found


def check_settings(recipe: Recipe) -> None:
    """Refuse what an evaluation says and nothing heeds.

    Raises:
        UsageError: it names the setting.
    """
    groups = {gate.metric.group for gate in gates_of_recipe(recipe)}
    timed = speed_spec(recipe) if "speed" in groups else None
    usual = msgspec.structs.asdict(EvaluationSpec())
    for spec in recipe.evaluation:
        heeded = {"confidence", "repeats"} if spec is timed else set[str]()
        if spec.data is not None and "quality" in groups:
            heeded |= usual.keys() - {"repeats"}
        for name, value in msgspec.structs.asdict(spec).items():
            if value != usual[name] and name not in heeded:
                where = f"gates: {', '.join(recipe.gates) or 'none'}"
                raise UsageError(f"`{name}` of an evaluation is not heeded", where=where, hint=_HEEDED)


def _check_names(gates: Sequence[Gate], names: Sequence[str]) -> None:
    """Refuse names that stand for two evaluations, or for none."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        hint = "give each a name of its own: `evaluation: [{data: FILE, name: NAME}, …]`"
        raise UsageError(f"two evaluations are called `{twice}`", where=f"evaluations: {', '.join(names)}", hint=hint)
    for gate in gates:
        if not names:
            raise UsageError(
                f"gate `{gate.text}` needs test data",
                where="calibration text is not taken for it: an artifact has been fitted to that",
                hint="name other data with --gate-data SPEC, in a recipe `evaluation: {data: SPEC}`",
            )
        if gate.evaluation is not None and gate.evaluation not in names:
            where, hint = f"gate {gate.text}", nearest(gate.evaluation, names)
            raise UsageError(f"no evaluation `{gate.evaluation}`", where=where, hint=hint)


def _check_all_used(gates: Sequence[Gate], found: Sequence[Assigned]) -> None:
    """Refuse a gate that no data give, and data that no gate needs."""
    tasks = "\n".join(f"{one.name}: {one.task.name}" for one in found)
    lost = next((gate for gate in gates if not any(gate in one.gates for one in found)), None)
    if lost is not None:
        needs = " or ".join(lost.metric.tasks)
        hint = f"name the task of an evaluation: `{{data: FILE, task: {lost.metric.tasks[0]}}}`"
        raise UsageError(f"no evaluation gives `{lost.name}`, which needs {needs}", where=tasks, hint=hint)
    idle = next((one for one in found if not one.gates), None)
    if idle is not None:
        raise UsageError(
            f"no gate is measured with `{idle.options.data}`",
            where=f"gates: {', '.join(gate.text for gate in gates)}\n{tasks}",
            hint="leave that evaluation out, add a gate, or name its task",
        )


def _options(spec: EvaluationSpec) -> EvalOptions:
    """Return how quality is to be measured.

    Raises:
        UsageError: the task is one that gates do not take.
    """
    if spec.task is not None and spec.task.startswith(HARNESS):
        raise UsageError(
            f"gates cannot be measured with `{spec.task}`",
            where="gates take tasks that are paired with the source sample by sample",
            hint=f"run `llmopt eval DIR --task {spec.task}` on the finished artifact, and gate on --gate-data",
        )
    samples = TaskOptions(spec.length, spec.samples, spec.max_new_tokens)
    return EvalOptions(spec.data, spec.task, spec.columns, samples, spec.confidence)
