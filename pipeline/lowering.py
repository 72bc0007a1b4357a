"""From torch to a graph: tracing the model, running the passes that work on graphs, writing the export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..core.exports import ExportableModel, ExportResult, GraphExporter
from ..core.graph import GraphModel
from ..core.passes import GraphPass, PassContext
from ..graphs.nodes import size
from ..models.handle import TorchModel
from ..models.onnx_file import GraphSource
from ..models.text import batches
from ..passes import PASSES
from .cache.graphs import KeptGraphs, Lowered
from .cache.keys import uses_samples

if TYPE_CHECKING:
    import onnx_ir as ir

AnyGraphPass = GraphPass[Any]
Array = np.ndarray[Any, Any]


def graph_passes(exporter: GraphExporter[Any], passes: Sequence[Any], *, traced: bool = True) -> list[AnyGraphPass]:
    """Return the passes that run on an exporter's graph: the recipe's, or the exporter's own where it names none.

    Args:
        exporter: the format.
        passes: the recipe's.
        traced: whether the graph is traced; one that is a source is left as it is where the recipe names none.
    """
    named = [cast("AnyGraphPass", one) for one in passes if isinstance(one, GraphPass)]
    if named or not traced:
        return named
    made = [PASSES.load(name) for name in exporter.default_passes()]
    return cast("list[AnyGraphPass]", [kind(kind.Params()) for kind in made])


def export_graph(
    exporter: GraphExporter[Any],
    model: TorchModel | GraphSource,
    passes: Sequence[AnyGraphPass],
    directory: Path,
    *,
    context: PassContext,
    kept: KeptGraphs,
) -> tuple[ExportResult, Lowered]:
    """Trace, or read the graph where the model is one, run the passes, and write.

    Args:
        exporter: the format.
        model: the model as the torch passes left it.
        passes: those that work on the graph.
        directory: where to write.
        context: for the passes, with the calibration samples.
        kept: what earlier runs made of the graph.
    """
    source = isinstance(model, GraphSource)
    title = "reading the graph" if source else "tracing to ONNX"
    with context.reporter.step(title, 1 + len(passes) + 1) as step:
        lowered = kept.latest()
        if lowered is None:
            lowered = Lowered(_read(model, passes) if source else exporter.trace(model))
            kept.offer(lowered)
        done = len(lowered.results)
        step.advance(1 + done, detail=passes[done - 1].name if done else "read" if source else "traced")
        for one in passes[done:]:
            if one.rounds:
                _carry_codes(exporter, model, lowered)
            _run(one, model, exporter, lowered, context)
            kept.offer(lowered)
            step.advance(detail=one.name)
        notes = _carry_codes(exporter, model, lowered)
        # Of a graph's source, saving asks for facts and side files alone.
        notes += exporter.save(lowered.graph, cast("ExportableModel", model), directory)
        step.advance(detail="saved")
    return ExportResult(notes, frozenset(lowered.rounded)), lowered


def _run(
    one: AnyGraphPass,
    model: TorchModel | GraphSource,
    exporter: GraphExporter[Any],
    lowered: Lowered,
    context: PassContext,
) -> None:
    """Run a pass, which sees calibration samples only if its key in the cache holds them."""
    shown = context if uses_samples(one) else replace(context, rows=())
    feeds = _feeds(lowered.graph, shown.rows, decoder=model.facts.is_encoder_decoder)
    # A graph counts the names that it makes up: in a new one they follow from what is there, as in one that was kept.
    state = GraphModel(lowered.graph.clone(), model.facts, exporter.engine, feeds, lowered.rounded)
    result = one.run(state, shown)
    lowered.results.append(result)
    lowered.graph, lowered.cached = state.graph, False


def _carry_codes(exporter: GraphExporter[Any], model: TorchModel | GraphSource, lowered: Lowered) -> list[str]:
    """Put the codes of quantized layers into the graph, once, and return notes for the user."""
    if lowered.notes is None:
        lowered.notes = [] if isinstance(model, GraphSource) else exporter.carry_codes(lowered.graph, model)
    return lowered.notes


def _read(source: GraphSource, passes: Sequence[AnyGraphPass]) -> ir.Model:
    """Return the source's graph, with the sizes of its values, and its attention found where a pass looks for it."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    from ..graphs.raising import raise_attention
    from ..graphs.shapes import infer_shapes

    graph = source.graph()
    ClearMetadataAndDocStringPass()(graph)  # exporters note stack traces there, with the paths of a machine
    infer_shapes(graph)
    if any(one.reads_attention for one in passes):
        raise_attention(graph)
    return graph


def _feeds(graph: ir.Model, rows: Sequence[Sequence[int]], *, decoder: bool) -> list[Mapping[str, Array]]:
    """Return calibration batches with everything that the graph asks for; texts of a batch are equally long."""
    names = {str(value.name): value for value in graph.graph.inputs}
    feeds: list[Mapping[str, Array]] = []
    for batch in batches(rows, decoder=decoder):
        feed: dict[str, Array] = {name: tensor.numpy() for name, tensor in batch.items() if name in names}
        ids: Array = feed["input_ids"]
        made: dict[str, Array] = {
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
            "position_ids": np.zeros_like(ids) + np.arange(ids.shape[1]),
        }
        feed |= {name: value for name, value in made.items() if name in names}
        for name, value in names.items():
            if name.startswith("past_key_values.") and value.dtype is not None:
                heads, width = size(value, 1) or 0, size(value, 3) or 0
                feed[name] = np.zeros((len(ids), heads, 0, width), value.dtype.numpy())
        feeds.append(feed)
    return feeds
