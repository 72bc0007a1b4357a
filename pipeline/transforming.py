"""Carrying out the passes of a recipe on the model's weights, one step after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ..core.passes import BlockPass, ModelPass, PassContext, PassResult, SurveyPass
from ..core.plan import Limits
from ..core.processes import is_main
from ..models.handle import TorchModel
from .cache.blocks_done import BlocksDone
from .cache.kept import KeptSteps, Work
from .cache.keys import uses_samples
from .materials import Start, with_materials
from .record import Recorder
from .steps import AnyPass, sweeps
from .sweep import run_sweep


def run_passes(
    model: TorchModel,
    passes: Sequence[AnyPass],
    context: PassContext,
    limits: Limits,
    *,
    start: Start,
    steps: KeptSteps,
    recorder: Recorder,
) -> tuple[TorchModel, list[PassResult], PassContext]:
    """Return the model, what each pass did, and the context as they left it for the passes on graphs."""
    results: list[PassResult] = []
    size = model.nbytes
    for group in sweeps(passes):
        if not is_main() and not any(one.trains() for one in passes[len(results) :]):
            break
        shown = context if any(map(uses_samples, group)) else replace(context, rows=())
        work = _work(group, shown, limits, start, len(results) + 1)
        with recorder.step(" + ".join(one.name for one in group)) as record:
            made = steps.make(group, passes[len(results) + len(group) :], model, work)
            record.cached, record.blocks_resumed = made.cached, made.blocks_resumed
            record.seconds_saved = made.seconds_saved
        model = made.model
        results += made.results
        for result in made.results:
            context = replace(context, rows=renumbered(context.rows, result))
        if isinstance(group[0], SurveyPass):
            context = replace(context, allocation={**context.allocation, **made.results[0].allocation})
        done = list(zip(group, made.results, strict=True))
        size = _note_sizes(done, size, model.nbytes)
        for one, result in done:
            for note in result.notes:
                context.reporter.note(f"{one.name}: {note}")
    return model, results, context


def _note_sizes(done: Sequence[tuple[AnyPass, PassResult]], before: int, after: int) -> int:
    """Note the model's bytes after each pass of a sweep: they change with the first that rounds weights."""
    size = before
    for at, (one, result) in enumerate(done):
        if one.grid() is not None or at == len(done) - 1:
            size = after
        result.weight_bytes = size
    return after


def _work(group: Sequence[AnyPass], context: PassContext, limits: Limits, start: Start, number: int) -> Work:
    """Return what carries out a step, the passes from the recipe's `number`-th on."""
    first = group[0]
    if isinstance(first, SurveyPass):

        def survey(model: TorchModel, done: BlocksDone | None, _: Path | None) -> tuple[TorchModel, list[PassResult]]:
            changed, result = run_survey(model, first, context, limits, done=done)
            return changed, [result]

        return survey
    if isinstance(first, BlockPass):
        blocks = cast("list[BlockPass[Any]]", group)

        def sweep(model: TorchModel, done: BlocksDone | None, _: Path | None) -> tuple[TorchModel, list[PassResult]]:
            results = run_sweep(model, blocks, context.rows, context, limits, done=done)
            return model.with_found_adapter() if model.store.adapted else model, results

        return sweep

    def run(model: TorchModel, _: BlocksDone | None, checkpoints: Path | None) -> tuple[TorchModel, list[PassResult]]:
        materials = replace(with_materials(first, model, context, start, number), checkpoints=checkpoints)
        changed, result = cast("ModelPass[Any]", first).run(model, materials)
        return cast("TorchModel", changed), [result]

    return run


def renumbered(rows: Sequence[Sequence[int]], result: PassResult) -> list[list[int]]:
    """Return rows in a pass's new ids; tokens that are gone are left out, and rows that have too few others."""
    if result.vocabulary is None:
        return [list(row) for row in rows]
    places = {old: new for new, old in enumerate(result.vocabulary)}
    found = [[places[token] for token in row if token in places] for row in rows]
    return [row for row in found if len(row) > 1]


def run_survey(
    model: TorchModel,
    survey: SurveyPass[Any],
    context: PassContext,
    limits: Limits,
    *,
    done: BlocksDone | None = None,
) -> tuple[TorchModel, PassResult]:
    """Show a survey every block, and return the model and the result that it concludes with."""
    survey.begin(model, context)
    (result,) = run_sweep(model, [survey], context.rows, context, limits, done=done)
    changed, concluded = survey.conclude(model, context)
    result.absorb(concluded)
    return cast("TorchModel", changed), result
