"""Carrying out a plan: passes, exports, verification, manifest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..core.errors import UsageError
from ..core.manifest import MANIFEST, RUN, ExportRecord, Manifest, PassRecord
from ..core.passes import GraphPass, PassContext
from ..core.plan import Plan
from ..core.processes import is_main, left_alone, world_size
from ..core.progress import Reporter, Silent
from ..core.threads import DEFAULT
from ..models.handle import TorchModel
from ..models.locate import Location
from ..models.onnx_file import GraphSource
from .cache.figures import KeptFigures
from .cache.graphs import KeptGraphs
from .cache.held import Held, holding
from .cache.kept import KeptSteps
from .cache.keys import Keys
from .cache.store import CacheSettings, open_store
from .exporting import run_exports
from .graph_reference import graph_reference
from .manifest import keep_answers, manifest_of, pass_record, with_card, write_record
from .materials import Start
from .measuring.gating import check_test_data, run_gates
from .output import readable, staging
from .parity import Reference, make_reference
from .reads import paths_of
from .record import Recorder
from .source import Source, source_of
from .steps import AnyPass, exporters_of, passes_of
from .threads import fixed_threads
from .transforming import renumbered, run_passes
from .verdict import refuse, unverified


def run_plan(
    plan: Plan,
    output: Path,
    *,
    force: bool,
    reporter: Reporter,
    cache: CacheSettings | None = None,
    gates: bool = True,
) -> Manifest:
    """Execute a plan and put the verified artifact at `output`.

    Of several processes that train together one writes the artifact; the others end after the pass that they share, and
    their manifest names no exports.

    Args:
        plan: a checked plan.
        output: the folder to write; appears whole or not at all.
        force: replace a former artifact of ours.
        reporter: shown progress.
        cache: where results of passes are kept for later runs; None keeps none.
        gates: measure the recipe's gates, and refuse an artifact that does not meet them.

    Raises:
        UsageError: the output must not be replaced, or the model or the data cannot be used.
        UnmetError: an artifact is not the model that was exported, or does not meet a gate; it lies at `OUTPUT.failed`.
        LlmoptError: anything else that went wrong.
    """
    if not is_main():
        reporter = Silent()
    recorder = Recorder()
    with (
        fixed_threads(plan.recipe.threads or DEFAULT),
        staging(output, force=force, inputs=paths_of(plan.reads)) as stage,
        ExitStack() as behind,
    ):
        source = source_of(plan, reporter)
        if gates:
            check_test_data(plan, source.location)
        passes = passes_of(plan.recipe)
        _check_processes(passes)
        store = None if cache is None or world_size() > 1 else open_store(cache, reporter)
        held = behind.enter_context(holding(Held(store, plan.recipe.model.id, reporter, spoiled=source.spoiled)))
        keys = _keys(plan, source)
        steps = KeptSteps(held, keys, stage.work)
        done = _transform(plan, source, passes, steps=steps, work=stage.work, recorder=recorder, reporter=reporter)
        if not is_main():
            return manifest_of(plan, source, done.records, [], {})
        reference = _reference(done, plan.recipe.seed, passes)
        exports = run_exports(
            done.model,
            passes,
            exporters_of(plan.recipe),
            reference=reference,
            stage=stage,
            context=done.context,
            recorder=recorder,
            kept=partial(KeptGraphs, held, keys),
        )
        answers = keep_answers(reference, stage.root)
        manifest = with_card(manifest_of(plan, source, done.records, exports, answers), stage.root)
        write_record(manifest, stage.root / MANIFEST)
        del done, reference
        if gates and not unverified(exports):
            kept = KeptFigures(store, source.reads, plan.recipe.model.id, reporter)
            _measure_gates(plan, source.location, exports, stage.root, kept=kept, recorder=recorder)
        write_record(recorder.finish(source.reads.records()), stage.root / RUN)
        readable(stage.root)
        source.reads.check()
        refuse(exports, recorder.gates, stage, output)
        stage.commit()
    return manifest


@dataclass(frozen=True, slots=True)
class _Done:
    """The model as the passes on its weights left it.

    Attributes:
        model: it.
        records: what each pass did.
        context: for the passes on graphs.
        held_out: samples that no pass saw, in the ids that the model has now.
    """

    model: TorchModel | GraphSource
    records: list[PassRecord]
    context: PassContext
    held_out: list[list[int]]


def _transform(
    plan: Plan,
    source: Source,
    passes: Sequence[AnyPass],
    *,
    steps: KeptSteps,
    work: Path,
    recorder: Recorder,
    reporter: Reporter,
) -> _Done:
    """Run the passes on weights; of a process that only trains along, up to the one that is shared."""
    held_out, rows = ([], []) if source.samples is None else (source.samples.held_out, source.samples.rows)
    checkpoint, limits, seed = source.checkpoint, plan.limits, plan.recipe.seed
    context = PassContext(seed=seed, reporter=reporter, statistics_bytes=limits.statistics_bytes, rows=rows)
    if isinstance(checkpoint, GraphSource):
        return _Done(checkpoint, [], context, held_out)
    model = TorchModel.create(source.location, checkpoint, plan.facts, work)
    _warn_of_unused(model, reporter)
    start = Start(source.location, checkpoint, plan.facts, plan.recipe.calibration, work)
    own = [one for one in passes if not isinstance(one, GraphPass)]
    model, results, context = run_passes(model, own, context, limits, start=start, steps=steps, recorder=recorder)
    for result in results:
        held_out = renumbered(held_out, result)
    records = [pass_record(one, result) for one, result in zip(own, results, strict=is_main())]
    return _Done(model, records, context, held_out)


def _reference(done: _Done, seed: int, passes: Sequence[AnyPass]) -> Reference:
    """Return what the artifacts are compared with."""
    axes = {name: size for one in passes if isinstance(one, GraphPass) for name, size in one.fixed_axes().items()}
    if isinstance(done.model, GraphSource):
        return graph_reference(done.model, done.held_out, seed, axes)
    return make_reference(done.model, done.held_out, seed, axes)


def _check_processes(passes: Sequence[AnyPass]) -> None:
    """Refuse several processes where there is no work to share, or work that would part after the first share."""
    shared = [one.name for one in passes if one.trains()]
    if shared and left_alone():
        raise UsageError(
            "accelerate started a single process",
            where="it was asked for several, and does so only for GPUs unless it is told otherwise",
            hint="launch with `accelerate launch --multi_gpu …`, which starts them on CPUs too, or with torchrun",
        )
    if world_size() > 1 and len(shared) != 1:
        raise UsageError(
            f"{world_size()} processes have nothing to share"
            if not shared
            else "several processes share one pass only",
            where=f"passes that train: {', '.join(shared) or 'none'}",
            hint="run it as a single process, without `accelerate launch`"
            if not shared
            else "make two runs of it, the second from the artifact of the first",
        )


def _warn_of_unused(model: TorchModel, reporter: Reporter) -> None:
    """Build the module tree once, which tells whether model and checkpoint belong together, and say what is over."""
    skeleton = model.skeleton()
    patterns = getattr(skeleton.model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unused = [name for name in skeleton.naming.unused if not any(re.search(pattern, name) for pattern in patterns)]
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        reporter.warn(f"{type(skeleton.model).__name__} does not use `{'`, `'.join(unused[:3])}`{more}")


def _keys(plan: Plan, source: Source) -> Keys:
    samples, calibration, reads = source.samples, plan.recipe.calibration, source.reads
    data = None if samples is None or calibration is None else (samples.sha256, calibration.column)
    rows = [] if samples is None else samples.rows
    return Keys(plan.recipe, source.location.task, reads, rows=rows, data=data, limits=plan.limits)


def _measure_gates(
    plan: Plan,
    location: Location,
    exports: Sequence[ExportRecord],
    root: Path,
    *,
    kept: KeptFigures,
    recorder: Recorder,
) -> None:
    if plan.recipe.gates:
        with recorder.step("gates"):
            recorder.gates = run_gates(plan, location, exports, root, kept)
