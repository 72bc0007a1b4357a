"""Carrying out a plan: passes, exports, verification, manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec

from ..calibration.samples import Samples, load_samples
from ..calibration.source import open_source
from ..core.errors import UnmetError, UsageError
from ..core.exports import ExportContext, GraphExporter
from ..core.manifest import MANIFEST, RUN, ExportRecord, FileRecord, GateRecord, Manifest, Parity, PassRecord
from ..core.passes import BlockPass, GraphPass, ModelPass, PassContext, PassResult, SurveyPass
from ..core.plan import Limits, Plan
from ..core.processes import is_main, left_alone, world_size
from ..core.progress import Reporter, Silent
from ..core.threads import DEFAULT
from ..evaluation.gates import in_words as gate_in_words
from ..models.checkpoint import Checkpoint
from ..models.handle import TorchModel
from ..models.locate import Location, locate
from ..models.onnx_file import GraphSource
from ..models.text import load_tokenizer
from .adapted import compare_adapted
from .background import in_background
from .cache.blocks_done import BlocksDone
from .cache.kept import KeptSteps, Work, keeping
from .cache.keys import Keys, uses_samples
from .cache.store import CacheSettings, open_store
from .card import CARD, license_of, write_card
from .fingerprint import FINGERPRINT, write_fingerprint
from .graph_reference import graph_reference
from .inputs import check_unchanged, input_records
from .lowering import export_graph, graph_passes
from .materials import Start, with_materials
from .measuring.gating import check_test_data, run_gates
from .output import Staging, file_record, file_records, inputs_of, readable, staging
from .parity import ROWS, Reference, compare, make_reference
from .parts import source_parts
from .record import Recorder
from .steps import AnyExporter, AnyPass, exporters_of, passes_of, sweeps
from .sweep import run_sweep
from .threads import fixed_threads
from .versions import own_version, versions
from .watched import Watched


@dataclass(frozen=True, slots=True)
class _Source:
    """The model that a run starts from, and the text it is calibrated on.

    Attributes:
        watched: their files, which must stay as they are until the run has ended; those of the model first.
    """

    location: Location
    checkpoint: Checkpoint | GraphSource
    samples: Samples | None
    watched: Sequence[Watched]

    def sha256(self) -> str:
        """Return the hash of the checkpoint, once it is computed."""
        return self.watched[0].sha256()


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
        staging(output, force=force, inputs=inputs_of(plan.recipe)) as stage,
        ExitStack() as behind,
    ):
        inputs = in_background(partial(input_records, plan.recipe))
        source = _open_source(plan, reporter)
        location, checkpoint, samples = source.location, source.checkpoint, source.samples
        if gates:
            check_test_data(plan, location)
        every = passes_of(plan.recipe)
        passes = [one for one in every if not isinstance(one, GraphPass)]
        _check_processes(passes)
        axes = {name: size for one in every if isinstance(one, GraphPass) for name, size in one.fixed_axes().items()}
        held_out, rows = (samples.held_out, samples.rows) if samples else ([], [])
        context = PassContext(
            seed=plan.recipe.seed, reporter=reporter, statistics_bytes=plan.limits.statistics_bytes, rows=rows
        )
        results: list[PassResult] = []
        if isinstance(checkpoint, GraphSource):
            model = checkpoint
            reference = graph_reference(model, held_out, plan.recipe.seed, axes)
        else:
            model = TorchModel.create(location, checkpoint, plan.facts, stage.work)
            _warn_of_unused(model, reporter)
            start = Start(location, checkpoint, plan.facts, plan.recipe.calibration, stage.work)
            store = None if cache is None or world_size() > 1 else open_store(cache, reporter)
            steps = KeptSteps(
                store,
                _keys(plan, source),
                stage.work,
                plan.recipe.model.id,
                reporter,
                spoiled=lambda: any(one.changed() for one in source.watched),
            )
            behind.enter_context(keeping(steps))
            model, results, context = _run_passes(
                model, passes, context, plan.limits, start=start, steps=steps, recorder=recorder
            )
            if not is_main():
                records = [_pass_record(one, result) for one, result in zip(passes, results, strict=False)]
                return _manifest(plan, source, records, [], {})
            for result in results:
                held_out = _renumbered(held_out, result)
            reference = make_reference(model, held_out, plan.recipe.seed, axes)
        records = [_pass_record(one, result) for one, result in zip(passes, results, strict=True)]
        exports = _run_exports(
            model,
            every,
            exporters_of(plan.recipe),
            reference=reference,
            stage=stage,
            context=context,
            recorder=recorder,
        )
        kept = _keep_answers(reference, stage.root)
        manifest = _with_card(_manifest(plan, source, records, exports, kept), stage.root)
        _write(manifest, stage.root / MANIFEST)
        del model, reference
        if gates and not _unverified(exports):
            _measure_gates(plan, location, exports, stage.root, reporter=reporter, recorder=recorder)
        check_unchanged(record for record in inputs() if record.sha256)  # the others are watched
        _write(recorder.finish(inputs()), stage.root / RUN)
        readable(stage.root)
        for one in source.watched:
            one.check()
        _refuse(exports, recorder.gates, stage, output)
        stage.commit()
    return manifest


def _open_source(plan: Plan, reporter: Reporter) -> _Source:
    location = locate(plan.recipe.model)
    checkpoint = Checkpoint(location.folder) if location.graph is None else GraphSource(location, plan.facts)
    watched = [Watched(checkpoint.files, checkpoint.sha256), *_watched_text(plan)]
    return _Source(location, checkpoint, _load_samples(plan, location, reporter), watched)


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


def _watched_text(plan: Plan) -> list[Watched]:
    """Return the file of the calibration text; none for a data set, whose texts are kept elsewhere."""
    spec = plan.recipe.calibration
    source = None if spec is None else open_source(spec.data, spec.column)
    if source is None or source.path is None:
        return []
    return [Watched([source.path], lambda: source.sha256() or "")]


def _load_samples(plan: Plan, location: Location, reporter: Reporter) -> Samples | None:
    spec = plan.recipe.calibration
    if spec is None:
        return None
    tokenizer = load_tokenizer(location.folder, trust_remote_code=location.trust_remote_code)
    return load_samples(spec, tokenizer, seed=plan.recipe.seed, held_out=ROWS, reporter=reporter)


def _keys(plan: Plan, source: _Source) -> Keys:
    samples, calibration = source.samples, plan.recipe.calibration
    data = None if samples is None or calibration is None else (samples.sha256, calibration.column)
    rows = [] if samples is None else samples.rows
    return Keys(plan.recipe, source.location, source.sha256, rows=rows, data=data, limits=plan.limits)


def _run_passes(
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
            context = replace(context, rows=_renumbered(context.rows, result))
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
            changed, result = _survey(model, first, context, limits, done=done)
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


def _renumbered(rows: Sequence[Sequence[int]], result: PassResult) -> list[list[int]]:
    """Return rows in a pass's new ids; tokens that are gone are left out, and rows that have too few others."""
    if result.vocabulary is None:
        return [list(row) for row in rows]
    places = {old: new for new, old in enumerate(result.vocabulary)}
    found = [[places[token] for token in row if token in places] for row in rows]
    return [row for row in found if len(row) > 1]


def _survey(
    model: TorchModel,
    survey: SurveyPass[Any],
    context: PassContext,
    limits: Limits,
    *,
    done: BlocksDone | None = None,
) -> tuple[TorchModel, PassResult]:
    survey.begin(model, context)
    (result,) = run_sweep(model, [survey], context.rows, context, limits, done=done)
    changed, concluded = survey.conclude(model, context)
    result.absorb(concluded)
    return cast("TorchModel", changed), result


def _run_exports(
    model: TorchModel | GraphSource,
    passes: Sequence[AnyPass],
    exporters: Sequence[AnyExporter],
    *,
    reference: Reference,
    stage: Staging,
    context: PassContext,
    recorder: Recorder,
) -> list[ExportRecord]:
    reporter = context.reporter
    records: list[ExportRecord] = []
    for exporter in exporters:
        directory = stage.root / exporter.name if len(exporters) > 1 else stage.root
        directory.mkdir(exist_ok=True)
        applied: list[GraphPass[Any]] = []
        results: list[PassResult] = []
        with recorder.step(f"export {exporter.name}"):
            if isinstance(exporter, GraphExporter):
                applied = graph_passes(exporter, passes, traced=isinstance(model, TorchModel))
                result, results = export_graph(exporter, model, applied, directory, rows=context.rows, context=context)
            else:
                assert isinstance(model, TorchModel)  # the plan refuses others
                result = exporter.export(model, directory, ExportContext(reporter=reporter))
        for one, made in zip(applied, results, strict=True):
            for note in made.notes:
                reporter.note(f"{one.name}: {note}")
        for note in result.notes:
            reporter.note(f"{exporter.name}: {note}")
        files = in_background(partial(file_records, directory))
        drop = max((drop for one in applied if (drop := one.drop()) is not None), default=None)
        title = f"verifying {exporter.name} in {exporter.opened_in()}"
        with recorder.step(f"verify {exporter.name}"), reporter.step(title, 1) as step:
            parity = compare(exporter, model, directory, reference, drop=drop, rounded=result.rounded)
            adapted = compare_adapted(exporter, model, directory, reference)
            step.advance(detail=in_words(parity))
        records.append(
            ExportRecord(
                name=exporter.name,
                directory=directory.relative_to(stage.root).as_posix(),
                params=msgspec.to_builtins(exporter.params),
                notes=result.notes,
                verification=parity,
                adapted=adapted,
                passes=[_pass_record(one, made) for one, made in zip(applied, results, strict=True)],
                files=files(),
            )
        )
    return records


def _keep_answers(reference: Reference, root: Path) -> dict[str, FileRecord]:
    """Write the answers that a later `llmopt verify` compares with."""
    if not write_fingerprint(reference, root / FINGERPRINT):
        return {}
    return {FINGERPRINT: file_record(root / FINGERPRINT)}


def _with_card(manifest: Manifest, root: Path) -> Manifest:
    """Write the model card, and return the manifest with that file among the others."""
    path = write_card(manifest, root)
    return msgspec.structs.replace(manifest, files={CARD: file_record(path), **manifest.files})


def in_words(parity: Parity) -> str:
    """Return the figures of a comparison in a line."""
    parts = [f"max difference {parity.max_difference:.3g}"]
    if parity.mean_kl is not None:
        parts.append(f"mean KL {parity.mean_kl:.3g}")
    if parity.top1_agreement is not None:
        parts.append(f"top-1 agreement {parity.top1_agreement:.2%}")
    if "mean_cosine_distance" in parity.tolerance and parity.mean_cosine_distance is not None:
        parts.append(f"mean cosine distance {parity.mean_cosine_distance:.3g}")
    if parity.weights_equal is not None:
        parts.append("weights equal bit for bit" if parity.weights_equal else "weights NOT equal")
    return ", ".join(parts)


def judged(record: ExportRecord) -> str:
    """Return the figures of an export, and what is allowed, in a line; one more where it has an adapter."""
    beside = {record.name: record.verification, f"{record.name} with its adapter": record.adapted}
    return "\n".join(_judged(name, parity) for name, parity in beside.items() if parity is not None)


def _judged(name: str, parity: Parity) -> str:
    limits = {"mean_kl": "mean KL"}
    allowed = ", ".join(
        f"{limits.get(key, key.replace('_', ' '))} {limit:g}" for key, limit in parity.tolerance.items()
    )
    return f"{name} in {parity.runtime}: {in_words(parity)}; allowed {allowed}"


def _refuse(exports: Sequence[ExportRecord], gates: Sequence[GateRecord], stage: Staging, output: Path) -> None:
    """Set an artifact aside that is not the model, or does not meet a gate.

    Raises:
        UnmetError: it says what, and where it lies.
    """
    _refuse_unmet(exports, stage, output)
    _refuse_gates(gates, stage, output)


def _refuse_unmet(exports: Sequence[ExportRecord], stage: Staging, output: Path) -> None:
    unmet = _unverified(exports)
    if not unmet:
        return
    failed = stage.set_aside()
    raise UnmetError(
        f"the artifact is not the model that was exported ({', '.join(record.name for record in unmet)})",
        where="\n".join(map(judged, unmet)),
        hint=f"it lies at {failed} for a look; nothing was written to {output}",
        artifact=failed,
    )


def _unverified(exports: Sequence[ExportRecord]) -> list[ExportRecord]:
    return [
        record
        for record in exports
        if any(parity is not None and not parity.passed for parity in (record.verification, record.adapted))
    ]


def _measure_gates(
    plan: Plan,
    location: Location,
    exports: Sequence[ExportRecord],
    root: Path,
    *,
    reporter: Reporter,
    recorder: Recorder,
) -> None:
    if plan.recipe.gates:
        with recorder.step("gates"):
            recorder.gates = run_gates(plan, location, exports, root, reporter)


def _refuse_gates(gates: Sequence[GateRecord], stage: Staging, output: Path) -> None:
    unmet = [(f"{gate.text} ({gate.export})", gate_in_words(gate)) for gate in gates if gate.verdict != "passed"]
    if not unmet:
        return
    failed = stage.set_aside()
    raise UnmetError(
        f"{len(unmet)} of {len(gates)} gates {'was' if len(unmet) == 1 else 'were'} not met",
        where="\n".join(f"{gate}: {words}" for gate, words in unmet),
        hint=f"the artifact lies at {failed} for a look; nothing was written to {output}",
        artifact=failed,
        unmet=unmet,
    )


def _pass_record(one: AnyPass, result: PassResult) -> PassRecord:
    return PassRecord(
        name=one.name,
        params=msgspec.to_builtins(one.params),
        changed=result.changed,
        skipped=[(skip.name, skip.reason) for skip in result.skipped],
        metrics=result.metrics,
        notes=result.notes,
        allocation=result.allocation,
        curve=result.curve,
        layers=result.layers,
        weight_bytes=result.weight_bytes,
    )


def _manifest(
    plan: Plan,
    source: _Source,
    passes: list[PassRecord],
    exports: list[ExportRecord],
    files: dict[str, FileRecord],
) -> Manifest:
    samples = source.samples
    return Manifest(
        llmopt=own_version(),
        recipe=plan.recipe.to_dict(),
        seed=plan.recipe.seed,
        source={
            "id": source.location.source,
            "revision": source.location.revision,
            "sha256": source.sha256(),
            "architecture": plan.facts.architecture,
            "dtype": plan.facts.dtype,
            "parameters": plan.facts.parameters,
            "bytes": plan.facts.bytes,
            "parts": source_parts(source.checkpoint),
            **license_of(source.location.folder),
        },
        calibration=None
        if samples is None
        else {
            "source": samples.source,
            "samples": len(samples.rows),
            "tokens": samples.tokens,
            "documents": samples.documents,
            "sha256": samples.sha256,
        },
        versions=versions(),
        passes=passes,
        exports=exports,
        files=files,
        limits={"batch_tokens": plan.limits.batch_tokens, "statistics_bytes": plan.limits.statistics_bytes},
    )


def _write(record: msgspec.Struct, path: Path) -> None:
    text = json.dumps(msgspec.to_builtins(record), indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
