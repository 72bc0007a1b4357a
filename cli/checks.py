"""What a build must meet, from the command line, and how its end is told to people and to pipelines."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from msgspec.structs import replace

from ..core.errors import LlmoptError, UnmetError, UsageError
from ..core.processes import is_main
from ..core.quantities import parse_share
from ..core.recipe import EvaluationSpec, Recipe
from .common import parse_columns

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ..core.manifest import Manifest, RunRecord
    from .building import Build
    from .render import Screen


_EVALUATION = ("data", "task", "column", "confidence")
"""What `--gate-…` says of the evaluation."""


def with_gates(recipe: Recipe, build: Build) -> Recipe:
    """Return a recipe with the gates of the command line behind its own, and the test data that it names.

    Raises:
        UsageError: a gate cannot be read, or test data is named and nothing measured with it.
    """
    from ..evaluation.gates import gates_of

    gates = (*recipe.gates, *gates_of(build.gate or [], where="--gate"))
    named = [name for name in _EVALUATION if getattr(build, f"gate_{name}") is not None]
    if named and not gates:
        raise UsageError(f"--gate-{named[0]} without a gate", hint="add one with --gate TEXT")
    if not named:
        return replace(recipe, gates=gates)
    return replace(recipe, gates=gates, evaluation=_evaluations(recipe.evaluation, build))


def _evaluations(written: Sequence[EvaluationSpec], build: Build) -> tuple[EvaluationSpec, ...]:
    """Return the recipe's evaluation as the command line changes it: one for each `--gate-data`.

    Raises:
        UsageError: it is not clear which is meant.
    """
    data, tasks = build.gate_data or [], build.gate_task or []
    if len(written) > 1:
        where = "options change a recipe's evaluation where it has one"
        raise UsageError(f"the recipe has {len(written)} evaluations", where=where, hint="change them in the recipe")
    if len(tasks) > 1 and len(tasks) != len(data):
        where, hint = f"{len(tasks)} --gate-task, {len(data)} --gate-data", "give one task for each, in order"
        raise UsageError("it is not clear which task is for which data", where=where, hint=hint)
    if build.gate_column is not None and len(data) > 1:
        hint = "name columns in a recipe: `evaluation: [{data: FILE, columns: {ROLE: NAME}}, …]`"
        raise UsageError(f"--gate-column with {len(data)} --gate-data", hint=hint)
    base = written[0] if written else EvaluationSpec()
    if len(data) > 1:
        base = replace(base, name=None)
    if build.gate_column is not None:
        base = replace(base, columns=parse_columns(build.gate_column, "--gate-column"))
    if build.gate_confidence is not None:
        base = replace(base, confidence=parse_share(build.gate_confidence, where="--gate-confidence"))
    named = data or [base.data]
    chosen = tasks if len(tasks) > 1 else (tasks or [base.task]) * len(named)
    return tuple(replace(base, data=one, task=task) for one, task in zip(named, chosen, strict=True))


@contextmanager
def reported(recipe: Recipe, build: Build, screen: Screen) -> Iterator[None]:
    """Tell how a build ends: the gates that an artifact did not meet, and every case as JUnit XML where asked for."""
    try:
        yield
    except Exception as error:
        from .failures import understood

        known = understood(error)
        aside = known.artifact if isinstance(known, UnmetError) else None
        if is_main() and known is not None:
            _tell(recipe, build, screen, aside, known)
        raise
    if is_main():
        _write(recipe, build, None if build.dry_run else build.output, None)


def _tell(recipe: Recipe, build: Build, screen: Screen, artifact: Path | None, error: LlmoptError) -> None:
    """Show and write what is known of a failed build; what goes wrong with that does not hide why it failed."""
    try:
        if artifact is not None and not build.json:
            _show_gates(artifact, screen)
        _write(recipe, build, artifact, error)
    except LlmoptError as other:
        screen.reporter.warn(other.what)


def _show_gates(artifact: Path, screen: Screen) -> None:
    from ..pipeline.artifact import read_run
    from .views import gate_sections

    run = read_run(artifact)
    sections = gate_sections(run.gates) if run is not None else []
    if sections:
        screen.show(sections, {}, summary=True)


def _write(recipe: Recipe, build: Build, artifact: Path | None, error: LlmoptError | None) -> None:
    if build.junit is None:
        return
    from ..pipeline.artifact import read_manifest, read_run
    from .junit import cases_of, write_junit

    manifest: Manifest | None = None
    run: RunRecord | None = None
    if artifact is not None:
        manifest, run = read_manifest(artifact), read_run(artifact)
    name = f"llmopt {recipe.model.id}" if build.output is None else f"llmopt {build.output}"
    write_junit(build.junit, name, cases_of(manifest, run, () if build.dry_run else recipe.gates, error), run)
