"""Writing the exports, and opening each in its runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from ..core.exports import ExportContext, GraphExporter
from ..core.manifest import ExportRecord
from ..core.passes import PassContext
from ..models.handle import TorchModel
from ..models.onnx_file import GraphSource
from .adapted import compare_adapted
from .background import in_background
from .cache.graphs import KeptGraphs
from .lowering import export_graph, graph_passes
from .manifest import pass_record
from .output import Staging, file_records
from .parity import Reference, compare
from .record import Recorder
from .steps import AnyExporter, AnyPass
from .verdict import in_words


def run_exports(
    model: TorchModel | GraphSource,
    passes: Sequence[AnyPass],
    exporters: Sequence[AnyExporter],
    *,
    reference: Reference,
    stage: Staging,
    context: PassContext,
    recorder: Recorder,
    kept: Callable[[GraphExporter[Any], Sequence[AnyPass]], KeptGraphs],
) -> list[ExportRecord]:
    """Write every export, with the passes on its graph, and compare what its runtime opens with the reference.

    Args:
        model: the model as the passes left it.
        passes: of the recipe; those on graphs are run here.
        exporters: in order.
        reference: what the artifacts are compared with.
        stage: where they are written.
        context: for passes and exporters.
        recorder: takes down what each step takes.
        kept: gives what earlier runs made of an export's graph.
    """
    reporter = context.reporter
    records: list[ExportRecord] = []
    for exporter in exporters:
        directory = stage.root / exporter.name if len(exporters) > 1 else stage.root
        directory.mkdir(exist_ok=True)
        with recorder.step(f"export {exporter.name}") as record:
            if isinstance(exporter, GraphExporter):
                applied = graph_passes(exporter, passes, traced=isinstance(model, TorchModel))
                graphs = kept(exporter, applied)
                result, lowered = export_graph(exporter, model, applied, directory, context=context, kept=graphs)
                record.seconds_saved, record.cached = lowered.seconds_saved, lowered.cached
                done = list(zip(applied, lowered.results, strict=True))
            else:
                assert isinstance(model, TorchModel)  # the plan refuses others
                result, done = exporter.export(model, directory, ExportContext(reporter=reporter)), []
        for name, notes in [*((one.name, made.notes) for one, made in done), (exporter.name, result.notes)]:
            for note in notes:
                reporter.note(f"{name}: {note}")
        files = in_background(partial(file_records, directory))
        drop = max((drop for one, _ in done if (drop := one.drop()) is not None), default=None)
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
                passes=[pass_record(one, made) for one, made in done],
                files=files(),
            )
        )
    return records
