"""Gates of a run: refused in the plan where they cannot be measured, measured once the artifact is verified."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from ...core.errors import LlmoptError, UsageError, nearest
from ...core.facts import ModelFacts
from ...core.manifest import ExportRecord, GateRecord
from ...core.plan import Plan, PlanStep
from ...core.recipe import Recipe
from ...evaluation.gates import Gate, Measured, judge
from ...evaluation.metrics import METRICS, Group
from ...models.locate import Location
from ...models.speech import is_speech
from ..artifact import Artifact
from ..cache.figures import Figures, KeptFigures
from .asking import ask, ask_one, comparable, measured, open_data
from .assigning import Assigned, assigned, check_settings, gates_of_recipe, speed_spec
from .speed import measure_speed
from .subjects import Subject, source_subject, subject_of
from .tasks import SOURCE, Found, Task

_GENERATING = frozenset({"prefill_speed", "prefill_speedup", "decode_speed", "decode_speedup"})
_COMPUTING = frozenset({"throughput", "throughput_speedup"})


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
    _check_exports(gates, recipe)
    sets = assigned(recipe, final.config, sentence=location.sentence is not None, model=facts.source)
    check_settings(recipe)
    steps = [_step(gate, f"{one.task.title} on {one.options.data}") for one in sets for gate in one.gates]
    for one in sets:
        if not facts.has_tokenizer:
            raise UsageError(
                f"`{facts.source}` has no tokenizer",
                where=f"gate `{one.gates[0].text}` reads text",
                hint="put tokenizer.json and tokenizer_config.json beside the weights",
            )
        open_data(one.task, one.options)
    for gate in gates:
        if gate.metric.group == "speed":
            _check_speed(gate, facts)
            steps.append(_step(gate, f"median of {speed_spec(recipe).repeats} repeats"))
        elif gate.metric.group == "size":
            steps.append(_step(gate, "counted"))
    order = [gate.text for gate in gates]
    return sorted(steps, key=lambda step: order.index(step.title))


def files_named(recipe: Recipe, location: Location, final: ModelFacts) -> Iterator[tuple[str, Path]]:
    """Yield the files that test data name, such as sounds, each behind what the recipe calls the data.

    Args:
        recipe: what to do.
        location: the model.
        final: its outline after all passes.

    Raises:
        LlmoptError: a row of the data cannot be used.
    """
    for one in assigned(recipe, final.config, sentence=location.sentence is not None, model=final.source):
        assert one.options.data is not None
        for path in one.task.files(open_data(one.task, one.options), one.options.samples.limit):
            yield one.options.data, path


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


def _check_speed(gate: Gate, facts: ModelFacts) -> None:
    if "vocab_size" not in facts.config or is_speech(facts.config):
        where = f"speed and memory are measured with text, `{facts.source}` is {facts.architecture}"
        raise UsageError(f"gate `{gate.text}` cannot be measured", where=where, hint="leave it out")
    if gate.name in (_COMPUTING if facts.is_causal_lm else _GENERATING):
        other = "decode_speed" if facts.is_causal_lm else "throughput"
        raise UsageError(
            f"gate `{gate.text}` cannot be measured",
            where=f"`{facts.source}` is {facts.architecture}",
            hint=f"{other} and {other.removesuffix('_speed')}_speedup are measured of such models",
        )


def check_test_data(plan: Plan, location: Location) -> None:
    """Read all test data with the source's tokenizer, so that a row that cannot be used is met before the work.

    Raises:
        LlmoptError: a row cannot be used.
    """
    if given := _assigned(plan, location):
        source = source_subject(location)
        for one in given:
            one.task(open_data(one.task, one.options), source, one.options.samples)


def _assigned(plan: Plan, location: Location) -> list[Assigned]:
    sentence = location.sentence is not None
    return assigned(plan.recipe, plan.facts.config, sentence=sentence, model=plan.facts.source)


def run_gates(
    plan: Plan, location: Location, exports: Sequence[ExportRecord], root: Path, kept: KeptFigures
) -> list[GateRecord]:
    """Measure all gates of every export, and judge them.

    Args:
        plan: the checked plan.
        location: the source model.
        exports: what was made.
        root: where it lies.
        kept: quality that was measured before; its reporter is shown progress, and what is measured with what.

    Raises:
        LlmoptError: something could not be measured.
    """
    run = _Run(plan, location, kept)
    found: list[tuple[int, GateRecord]] = []
    for export in exports:
        own = subject_of(Artifact(root / export.directory, None, None, None), name=export.name)
        found += run.measure(own, export)
    return [record for _, record in sorted(found, key=lambda one: one[0])]


class _Run:
    """The measurements of one run; what the source says is asked once for all exports where it can be."""

    def __init__(self, plan: Plan, location: Location, kept: KeptFigures) -> None:
        self._facts = plan.facts
        self._gates = gates_of_recipe(plan.recipe)
        self._data = _assigned(plan, location)
        self._speed_spec = speed_spec(plan.recipe)
        self._location = location
        self._kept, self._reporter = kept, kept.reporter
        self._source: Subject | None = None
        self._of_source: dict[str, Found] = {}
        calibration = plan.recipe.calibration
        for data in [one.options.data for one in self._data]:
            if calibration is not None and data == calibration.data:
                self._reporter.warn(f"the gates' test data is the calibration data, {data}: it flatters the artifact")

    def measure(self, own: Subject, export: ExportRecord) -> Iterator[tuple[int, GateRecord]]:
        """Measure the gates of one export; yield each with its place in the recipe."""
        for at, gate in self._of(export, "size"):
            yield at, judge(gate, self._size(gate.name, export), export=export.name)
        for one in self._data:
            gates = [(at, gate) for at, gate in self._of(export, "quality") if gate in one.gates]
            found = self._quality(own, export, one, sorted({gate.name for _, gate in gates})) if gates else {}
            for at, gate in gates:
                confidence = one.options.confidence
                measured = found[gate.name]
                yield at, judge(gate, measured, export=export.name, evaluation=one.name, confidence=confidence)
        speed = self._of(export, "speed")
        found = self._speed(own, [gate.name for _, gate in speed]) if speed else {}
        for at, gate in speed:
            yield at, judge(gate, found[gate.name], export=export.name, confidence=self._speed_spec.confidence)

    def _of(self, export: ExportRecord, group: Group) -> list[tuple[int, Gate]]:
        """Return the gates on one kind of metric that are for an export, each with its place in the recipe."""
        return [
            (at, gate)
            for at, gate in enumerate(self._gates)
            if gate.metric.group == group and gate.export in {None, export.name}
        ]

    def _model(self) -> Subject:
        self._source = self._source or source_subject(self._location)
        return self._source

    def _size(self, name: str, export: ExportRecord) -> Measured:
        written = sum(file.bytes for file in export.files.values())
        value = written / self._facts.bytes if METRICS[name].source else float(written)
        return Measured(value, (value, value), 0)

    def _speed(self, own: Subject, names: Sequence[str]) -> dict[str, Measured]:
        source = self._model() if any(METRICS[name].source for name in names) else None
        spec = self._speed_spec
        repeats, confidence = spec.repeats, spec.confidence
        wanted = list(dict.fromkeys(names))
        return measure_speed(own, source, wanted, repeats=repeats, confidence=confidence, reporter=self._reporter)

    def _quality(self, own: Subject, export: ExportRecord, data: Assigned, names: Sequence[str]) -> Figures:
        """Return metrics of quality, as an earlier run measured them where all that decides them is the same."""
        options = data.options
        assert options.data is not None
        read = self._kept.reads.digest("evaluation", options.data)
        if read is None:  # a data set of the hub may change
            return self._measured(own, data, names)
        depends_on = {
            "artifact": {name: file.sha256 for name, file in export.files.items()},
            "source": self._kept.reads.digest("model", self._kept.model),
            "data": read,
            "task": data.task.name,
            "options": [dict(options.columns), asdict(options.samples), options.confidence],
            "metrics": list(names),
            "runtime": own.runtime.version(),
        }
        title = f"gates of {own.name} with {options.data}"
        return self._kept.figures(title, depends_on, lambda: self._measured(own, data, names))

    def _measured(self, own: Subject, data: Assigned, names: Sequence[str]) -> Figures:
        options, kind = data.options, data.task
        task = kind(open_data(kind, options), own, options.samples)
        source = self._model() if any(METRICS[name].source for name in names) else None
        if source is not None and (obstacle := comparable(kind, own, source)) is not None:
            against = ", ".join(name for name in names if METRICS[name].source)
            raise LlmoptError(f"{against} cannot be measured", where=obstacle, hint="gate on accuracy or perplexity")
        self._reporter.note(
            f"gates of {own.name}: {task.title} on {options.data}, {len(task)} samples, in {own.runtime.version()}"
        )
        found = self._asked(task, own, source, data.name, names)
        return measured(kind.name, found, names, options.confidence)

    def _asked(self, task: Task, own: Subject, source: Subject | None, data: str, names: Sequence[str]) -> Found:
        """Ask the export, and the source unless its answers to these data are known from an earlier export."""
        if source is None or task.together:
            return ask(task, own, source, self._reporter, names)
        found = task.given() | ask_one(task, own, self._reporter)
        if data not in self._of_source:
            answers = ask_one(task, source, self._reporter)
            self._of_source[data] = {SOURCE + name: values for name, values in answers.items()}
        return found | self._of_source[data]
