"""Gates of a run: refused in the plan where they cannot be measured, measured once the artifact is verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...core.errors import LlmoptError, UsageError, nearest
from ...core.facts import ModelFacts
from ...core.manifest import ExportRecord, GateRecord
from ...core.plan import Plan, PlanStep
from ...core.progress import Reporter
from ...core.recipe import EvaluationSpec, Recipe
from ...evaluation.gates import Gate, Measured, judge, parse_gate
from ...evaluation.metrics import METRICS
from ...models.locate import Location
from ..artifact import Artifact
from .asking import (
    HARNESS,
    EvalOptions,
    ask,
    ask_one,
    choose_task,
    comparable,
    measured,
    open_data,
)
from .speed import measure_speed
from .subjects import Subject, source_subject, subject_of
from .tasks import SOURCE, Found, Task, TaskOptions

_GENERATING = frozenset({"prefill_speed", "prefill_speedup", "decode_speed", "decode_speedup"})
_COMPUTING = frozenset({"throughput", "throughput_speedup"})


def gates_of_recipe(recipe: Recipe) -> list[Gate]:
    """Return a recipe's gates.

    Raises:
        UsageError: one cannot be read.
    """
    return [parse_gate(text, where="gates") for text in recipe.gates]


def plan_gates(recipe: Recipe, location: Location, facts: ModelFacts, final: ModelFacts) -> list[PlanStep]:
    """Refuse gates that cannot be measured, and say how the others will be.

    Args:
        recipe: what to do.
        location: the model.
        facts: its outline.
        final: the outline after all passes.

    Raises:
        UsageError: an export that is not made, no test data, or a metric that the model or the data cannot give.
    """
    gates = gates_of_recipe(recipe)
    spec = recipe.evaluation or EvaluationSpec()
    _check_exports(gates, recipe)
    quality = [gate for gate in gates if gate.metric.group == "quality"]
    steps: list[PlanStep] = []
    if quality:
        task = _check_quality(quality, spec, location, facts, final)
        data = f"{task.title} on {spec.data}"
        steps += [_step(gate, data) for gate in quality]
    for gate in gates:
        if gate.metric.group == "speed":
            _check_speed(gate, facts)
            steps.append(_step(gate, f"median of {spec.repeats} repeats"))
        elif gate.metric.group == "size":
            steps.append(_step(gate, "counted"))
    order = [gate.text for gate in gates]
    return sorted(steps, key=lambda step: order.index(step.title))


def _step(gate: Gate, how: str) -> PlanStep:
    source = ", against the source" if gate.metric.source else ""
    return PlanStep(kind="gate", title=gate.text, detail=f"{gate.metric.about}: {how}{source}")


def _check_exports(gates: Sequence[Gate], recipe: Recipe) -> None:
    if gates and not recipe.exports:
        raise UsageError("there is nothing to measure gates of", where="the recipe has no exports", hint="add one")
    names = [step.name for step in recipe.exports]
    for gate in gates:
        if gate.export is not None and gate.export not in names:
            raise UsageError(f"no export `{gate.export}`", where=f"gate {gate.text}", hint=nearest(gate.export, names))


def _check_quality(
    gates: Sequence[Gate], spec: EvaluationSpec, location: Location, facts: ModelFacts, final: ModelFacts
) -> type[Task]:
    if spec.data is None:
        raise UsageError(
            f"gate `{gates[0].text}` needs test data",
            where="calibration text is not taken for it: an artifact has been fitted to that",
            hint="name other data with --gate-data SPEC, in a recipe `evaluation: {data: SPEC}`",
        )
    if spec.task is not None and spec.task.startswith(HARNESS):
        raise UsageError(
            f"gates cannot be measured with `{spec.task}`",
            where="gates take tasks that are paired with the source sample by sample",
            hint=f"run `llmopt eval DIR --task {spec.task}` on the finished artifact, and gate on --gate-data",
        )
    options = options_of(spec)
    sentence = location.sentence is not None
    wanted = [gate.name for gate in gates]
    task = choose_task(options, final.config, sentence=sentence, name=facts.source, wanted=wanted)
    if not facts.has_tokenizer:
        raise UsageError(
            f"`{facts.source}` has no tokenizer",
            where=f"gate `{gates[0].text}` reads text",
            hint="put tokenizer.json and tokenizer_config.json beside the weights",
        )
    open_data(task, options)
    return task


def _check_speed(gate: Gate, facts: ModelFacts) -> None:
    if "vocab_size" not in facts.config or facts.model_type == "whisper":
        where = f"speed and memory are measured with text, `{facts.source}` is {facts.architecture}"
        raise UsageError(f"gate `{gate.text}` cannot be measured", where=where, hint="leave it out")
    if gate.name in (_COMPUTING if facts.is_causal_lm else _GENERATING):
        other = "decode_speed" if facts.is_causal_lm else "throughput"
        raise UsageError(
            f"gate `{gate.text}` cannot be measured",
            where=f"`{facts.source}` is {facts.architecture}",
            hint=f"{other} and {other.removesuffix('_speed')}_speedup are measured of such models",
        )


def options_of(spec: EvaluationSpec) -> EvalOptions:
    """Return how a recipe wants quality to be measured."""
    samples = TaskOptions(spec.length, spec.samples, spec.max_new_tokens)
    return EvalOptions(spec.data, spec.task, spec.columns, samples, spec.confidence)


def check_test_data(plan: Plan, location: Location) -> None:
    """Read all test data with the source's tokenizer, so that a row that cannot be used is met before the work.

    Raises:
        LlmoptError: a row cannot be used.
    """
    quality = [gate.name for gate in gates_of_recipe(plan.recipe) if gate.metric.group == "quality"]
    if quality:
        options = options_of(plan.recipe.evaluation or EvaluationSpec())
        source = source_subject(location)
        sentence = location.sentence is not None
        kind = choose_task(options, plan.facts.config, sentence=sentence, name=source.name, wanted=quality)
        kind(open_data(kind, options), source, options.samples)


def run_gates(
    plan: Plan, location: Location, exports: Sequence[ExportRecord], root: Path, reporter: Reporter
) -> list[GateRecord]:
    """Measure all gates of every export, and judge them.

    Args:
        plan: the checked plan.
        location: the source model.
        exports: what was made.
        root: where it lies.
        reporter: shown progress, and what is measured with what.

    Raises:
        LlmoptError: something could not be measured.
    """
    gates = gates_of_recipe(plan.recipe)
    if not gates:
        return []
    run = _Run(plan, location, reporter)
    records: dict[tuple[int, str], GateRecord] = {}
    for export in exports:
        own = subject_of(Artifact(root / export.directory, None, None, None), name=export.name)
        wanted = [gate for gate in gates if gate.export in {None, export.name}]
        found = run.measure(own, export, [gate.name for gate in wanted])
        for gate in wanted:
            confidence = (plan.recipe.evaluation or EvaluationSpec()).confidence
            record = judge(gate, found[gate.name], export=export.name, confidence=confidence)
            records[gates.index(gate), export.name] = record
    return [records[key] for key in sorted(records, key=lambda key: key[0])]


class _Run:
    """The measurements of one run; what the source says is asked once for all exports where it can be."""

    def __init__(self, plan: Plan, location: Location, reporter: Reporter) -> None:
        self._facts = plan.facts
        self._spec = plan.recipe.evaluation or EvaluationSpec()
        self._location = location
        self._reporter = reporter
        self._source: Subject | None = None
        self._of_source: Found | None = None
        calibration = plan.recipe.calibration
        same = calibration is not None and self._spec.data == calibration.data
        if same and any(gate.metric.group == "quality" for gate in gates_of_recipe(plan.recipe)):
            reporter.warn(f"the gates' test data is the calibration data, {self._spec.data}: it flatters the artifact")

    def measure(self, own: Subject, export: ExportRecord, names: Sequence[str]) -> Mapping[str, Measured]:
        """Measure metrics of one export."""
        groups: dict[str, list[str]] = {}
        for name in dict.fromkeys(names):
            groups.setdefault(METRICS[name].group, []).append(name)
        found: dict[str, Measured] = {}
        for name in groups.get("size", ()):
            found[name] = self._size(name, export)
        if quality := groups.get("quality"):
            found |= self._quality(own, quality)
        if speed := groups.get("speed"):
            source = self._model() if any(METRICS[name].source for name in speed) else None
            found |= measure_speed(
                own,
                source,
                speed,
                repeats=self._spec.repeats,
                confidence=self._spec.confidence,
                reporter=self._reporter,
            )
        return found

    def _model(self) -> Subject:
        self._source = self._source or source_subject(self._location)
        return self._source

    def _size(self, name: str, export: ExportRecord) -> Measured:
        written = sum(file.bytes for file in export.files.values())
        value = written / self._facts.bytes if METRICS[name].source else float(written)
        return Measured(value, (value, value), 0)

    def _quality(self, own: Subject, names: Sequence[str]) -> dict[str, Measured]:
        options = options_of(self._spec)
        sentence = self._location.sentence is not None
        kind = choose_task(options, own.config, sentence=sentence, name=own.name, wanted=names)
        task = kind(open_data(kind, options), own, options.samples)
        source = self._model() if any(METRICS[name].source for name in names) else None
        if source is not None and (obstacle := comparable(kind, own, source)) is not None:
            against = ", ".join(name for name in names if METRICS[name].source)
            raise LlmoptError(f"{against} cannot be measured", where=obstacle, hint="gate on accuracy or perplexity")
        self._reporter.note(
            f"gates of {own.name}: {task.title} on {options.data}, {len(task)} samples, in {own.runtime.version()}"
        )
        return measured(kind.name, self._asked(task, own, source, names), names, options.confidence)

    def _asked(self, task: Task, own: Subject, source: Subject | None, names: Sequence[str]) -> Found:
        """Ask the export, and the source unless its answers are known from an earlier export."""
        if source is None or task.together:
            return ask(task, own, source, self._reporter, names)
        found = task.given() | ask_one(task, own, self._reporter)
        if self._of_source is None:
            self._of_source = {SOURCE + name: values for name, values in ask_one(task, source, self._reporter).items()}
        return found | self._of_source
