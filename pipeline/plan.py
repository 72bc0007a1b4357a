"""From a recipe to a plan: everything that can be refused is refused here, before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from ..core.errors import UsageError
from ..core.exports import GraphExporter
from ..core.facts import ModelFacts
from ..core.params import in_words
from ..core.passes import AllocationPass, BlockPass, GraphPass, Need
from ..core.plan import Plan, PlanStep
from ..core.recipe import Recipe
from ..core.target import Target
from ..models.checkpoint import DTYPES, Checkpoint
from ..models.locate import context_length, locate
from ..models.onnx_file import graph_outline
from ..models.outline import outline
from ..models.tasks import check_task
from .grids import adapter_bytes, check_exports, input_grid, packed_bytes, quantized_layers
from .materials import check_materials
from .measuring.gating import files_named, plan_gates
from .memory import estimate
from .reads import files_read
from .steps import AnyExporter, AnyPass, check_graph_passes, check_graph_source, exporters_of, passes_of, sweeps

_WIDTHS = dict(DTYPES.values())


def make_plan(recipe: Recipe, *, max_memory: int | None = None, written_in: Path | None = None) -> Plan:
    """Check a recipe against its model and lay out the work.

    Args:
        recipe: what to do.
        max_memory: bytes that the process may take at its peak.
        written_in: the file that holds the recipe, None where no file does.

    Raises:
        UsageError: it cannot work, or not within `max_memory`.
        LlmoptError: the checkpoint is damaged.
    """
    passes = passes_of(recipe)
    exporters = exporters_of(recipe)
    check_graph_passes(passes, exporters)
    if recipe.calibration is not None:
        _check_calibration(recipe)
    location = locate(recipe.model)
    if location.graph is not None:
        check_graph_source(passes, exporters, recipe.model.id)
        facts = graph_outline(location)
    else:
        checkpoint = Checkpoint(location.folder)
        facts = outline(location, checkpoint)
        if recipe.model.task is not None:
            check_task(location, checkpoint)
    _check_length(recipe, facts)
    if location.graph is None and facts.config.get("quantization_config"):
        raise UsageError(
            f"`{facts.source}` is quantized already",
            where=f"quant_method {facts.config['quantization_config'].get('quant_method')}",
            hint="start from the floating-point model",
        )
    target = _target(exporters)
    outlines = [facts]
    for one in passes:
        one.check(outlines[-1], target)
        outlines.append(one.facts_after(outlines[-1]))
        if Need.CALIBRATION in one.requires() and not facts.has_tokenizer:
            raise UsageError(
                f"`{facts.source}` has no tokenizer",
                where=f"pass `{one.name}` reads calibration text",
                hint="put tokenizer.json and tokenizer_config.json beside the weights, or use rtn",
            )
    final = outlines[-1]
    if location.graph is None:
        for one, before in zip(passes, outlines, strict=False):
            check_materials(one, location, facts, before, recipe.calibration)
    check_exports(exporters, passes, final)
    gates = plan_gates(recipe, location, facts, final)
    memory = estimate(facts, passes, exporters, recipe.calibration, max_memory)
    return Plan(
        recipe=recipe,
        facts=facts,
        steps=(*_steps(passes, exporters, outlines, traced=location.graph is None), *gates),
        skips=tuple(_skips(passes, final)),
        peak_bytes=memory.peak_bytes,
        output_bytes=sum(
            _size(exporter, passes, final) + adapter_bytes(passes, final) if location.graph is None else facts.bytes
            for exporter in exporters
        ),
        limits=memory.limits,
        reads=files_read(recipe, passes, written_in=written_in, named=files_named(recipe, location, final)),
    )


def _check_calibration(recipe: Recipe) -> None:
    from ..calibration.source import open_source

    assert recipe.calibration is not None
    open_source(recipe.calibration.data, recipe.calibration.column)


def _check_length(recipe: Recipe, facts: ModelFacts) -> None:
    context = context_length(facts.config)
    if recipe.calibration is not None and context is not None and recipe.calibration.length > context:
        raise UsageError(
            f"samples of {recipe.calibration.length} tokens are longer than the context of `{facts.source}`",
            where=f"config.json says {context}",
            hint=f"use --length {context} or less",
        )


def _target(exporters: Sequence[AnyExporter]) -> Target:
    wanted = {str(target) for exporter in exporters if (target := getattr(exporter.params, "target", None)) is not None}
    return Target(wanted.pop()) if len(wanted) == 1 else Target.CPU


def _steps(
    passes: Sequence[AnyPass], exporters: Sequence[AnyExporter], outlines: Sequence[ModelFacts], *, traced: bool
) -> list[PlanStep]:
    """Return the steps; `outlines` are the model's before each pass, and after the last."""
    steps: list[PlanStep] = []
    allocated = any(isinstance(one, AllocationPass) for one in passes)
    for group in sweeps(passes):
        if traced and isinstance(group[0], GraphPass) and (not steps or steps[-1].kind != "graph"):
            steps.append(
                PlanStep(kind="graph", title="to ONNX", detail="the model is traced; what follows works on its graph")
            )
        kind, facts = _kind(group[0]), outlines[next(at for at, one in enumerate(passes) if one is group[0])]
        covers = f"{facts.blocks} blocks, {len(facts.linears)} layers: " if kind == "sweep" else ""
        title = " + ".join(one.name for one in group)
        words = "; ".join(_in_words(one, allocated=allocated) for one in group)
        steps.append(PlanStep(kind=kind, title=title, detail=covers + words))
    for exporter in exporters:
        steps.append(
            PlanStep(kind="export", title=exporter.name, detail=in_words(msgspec.to_builtins(exporter.params)))
        )
        steps.append(PlanStep(kind="verify", title=exporter.name, detail=f"opened again in {exporter.opened_in()}"))
    return steps


def _kind(one: AnyPass) -> str:
    if isinstance(one, GraphPass):
        return "graph"
    return "sweep" if isinstance(one, BlockPass) else "pass"


def _in_words(one: AnyPass, *, allocated: bool) -> str:
    grid = one.grid()
    if grid is None:
        return in_words(msgspec.to_builtins(one.params))
    text = str(grid).replace(f"int{grid.bits}", "bits as chosen,", 1) if allocated else str(grid)
    overrides = len(getattr(one.params, "overrides", ()))
    return f"{text}, {overrides} override{'s' * (overrides > 1)}" if overrides else text


def _skips(passes: Sequence[AnyPass], facts: ModelFacts) -> list[tuple[str, str]]:
    skips: list[tuple[str, str]] = []
    for one in passes:
        if one.grid() is None:
            continue
        for linear in facts.linears:
            reason = one.left_alone(linear.name)
            if reason is not None:
                skips.append((linear.name, reason))
        skips.append(("embeddings, head and norms", "outside the repeated blocks"))
    return skips


def _size(exporter: AnyExporter, passes: Sequence[AnyPass], facts: ModelFacts) -> int:
    """Estimate an artifact's bytes: packed codes and scales, and everything else in its dtype."""
    onnx = exporter.runtime != "transformers"
    width = 4 if onnx and getattr(exporter.params, "dtype", "float32") == "float32" else _WIDTHS[facts.dtype]
    linears = quantized_layers(passes, facts)
    if isinstance(exporter, GraphExporter) and not linears:
        return _graph_size(passes, facts, width)
    if not linears or getattr(exporter.params, "format", "auto") == "plain":
        return facts.parameters * width
    rounded = input_grid(passes)
    # Beside int8 inputs weights are stored in whole bytes.
    containers = (2, 4, 8) if onnx else (8,) if rounded is not None and rounded.number == "int8" else None
    packed = packed_bytes(passes, facts, scale_bits=8 * width, containers=containers)
    weights = sum(linear.out_features * linear.in_features for linear in linears)
    return int(packed) + (facts.parameters - weights) * width


def _graph_size(passes: Sequence[AnyPass], facts: ModelFacts, width: int) -> int:
    """Estimate the bytes of a graph's weights: those of products, and all others, as its passes store them."""
    products, others = 8.0 * width, 8.0 * width
    for one in passes:
        if isinstance(one, GraphPass):
            bits = one.stored_bits()
            products, others = bits[0] or products, bits[1] or others
    weights = sum(linear.out_features * linear.in_features for linear in facts.linears)
    return int((weights * products + (facts.parameters - weights) * others) / 8)
