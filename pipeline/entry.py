"""What is known of one artifact, as its part of a report and of its model card."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from ..core.errors import LlmoptError
from ..core.manifest import ExportRecord, GateRecord, Manifest, PassRecord
from ..evaluation.metrics import METRICS
from ..evaluation.report.document import ArtifactEntry, ExportEntry, PassEntry, PathStep, Skipped
from .artifact import read_run
from .layer_maps import layer_maps, rounded_layers
from .loading import snippets
from .measured import Measured
from .parts import folder_parts

_NAMES_SHOWN = 5


def artifact_entry(
    manifest: Manifest, root: Path, *, name: str, path: str, measured: Measured | None = None
) -> ArtifactEntry:
    """Return what is known of one artifact.

    Args:
        manifest: its record.
        root: its folder.
        name: what it is called.
        path: its folder as people write it, in the lines that load it.
        measured: figures of `eval` and `bench`.
    """
    warnings: list[str] = []
    try:
        run = read_run(root)
    except LlmoptError as error:
        run = None
        warnings.append(f"{error.what}: times and memory are left out")
    given = _given(manifest)
    passes = [_pass(record, given) for record in manifest.passes]
    for export in manifest.exports:
        passes += [_pass(record, given, export=export.name) for record in export.passes]
    exports = [_export(record, manifest, root, path, warnings) for record in manifest.exports]
    for entry in exports:
        if entry.verification is None:
            warnings.append(f"{entry.name} was not verified")
        elif not entry.verification["passed"]:
            warnings.append(f"{entry.name} is not the model that was exported: a figure is outside its tolerance")
    records = [*manifest.passes, *(record for export in manifest.exports for record in export.passes)]
    layers = rounded_layers(records)
    return ArtifactEntry(
        name=name,
        path=path,
        llmopt=manifest.llmopt,
        summary=_summary(manifest, layers),
        source=manifest.source,
        calibration=manifest.calibration,
        recipe=_yaml(manifest.recipe),
        seed=manifest.seed,
        passes=passes,
        layers=_layers(layers),
        exports=exports,
        size_path=_size_path(manifest, exports, [] if run is None else run.gates),
        maps=layer_maps(layers),
        run=run,
        evaluations=measured.evaluations(root, manifest) if measured else [],
        speeds=measured.speeds(root, manifest) if measured else [],
        versions=manifest.versions,
        warnings=warnings,
        task=_task(manifest),
    )


def _task(manifest: Manifest) -> str | None:
    model = manifest.recipe.get("model")
    task = cast("dict[str, Any]", model).get("task") if isinstance(model, dict) else None
    return task if isinstance(task, str) else None


def _yaml(recipe: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)


def _given(manifest: Manifest) -> dict[str, set[str]]:
    """Return the parameters that the recipe gives, by pass."""
    given: dict[str, set[str]] = {}
    for step in cast("list[Any]", manifest.recipe.get("passes") or []):
        if isinstance(step, dict):
            for name, params in cast("dict[str, Any]", step).items():
                given.setdefault(name, set()).update(params or {})
    return given


def _pass(record: PassRecord, given: Mapping[str, set[str]], *, export: str | None = None) -> PassEntry:
    from ..core.params import value_in_words

    return PassEntry(
        name=record.name,
        export=export,
        params={
            name: value_in_words(value)
            for name, value in record.params.items()
            if name in given.get(record.name, ()) and value not in (None, (), [])
        },
        changed=len(record.changed),
        left_out=len(record.skipped),
        skipped=_skipped(record.skipped),
        metrics=record.metrics,
        notes=record.notes,
        curve=record.curve,
    )


def _skipped(skips: Sequence[tuple[str, str]]) -> list[Skipped]:
    names: dict[str, list[str]] = {}
    for name, reason in skips:
        names.setdefault(reason, []).append(name)
    return [
        Skipped(reason=reason, count=len(group), names=group[:_NAMES_SHOWN], more=max(0, len(group) - _NAMES_SHOWN))
        for reason, group in sorted(names.items(), key=lambda item: -len(item[1]))
    ]


def _export(record: ExportRecord, manifest: Manifest, root: Path, path: str, warnings: list[str]) -> ExportEntry:
    size = sum(file.bytes for file in record.files.values())
    folder = root / record.directory
    try:
        parts = folder_parts(folder) if folder.is_dir() else {}
    except LlmoptError as error:
        parts = {}
        warnings.append(f"{record.name}: {error.what}; its sizes by part are left out")
    if parts and size > sum(parts.values()):
        parts = parts | {"files": size - sum(parts.values())}
    where = path.rstrip("/") or "/"
    where = where if record.directory == "." else f"{where}/{record.directory}"
    return ExportEntry(
        name=record.name,
        directory=record.directory,
        files=len(record.files),
        size_bytes=size,
        share=_share(size, manifest),
        parts=parts,
        notes=record.notes,
        verification=None if record.verification is None else msgspec.to_builtins(record.verification),
        load=snippets(record, where, str(manifest.source.get("architecture", ""))),
        adapted=None if record.adapted is None else msgspec.to_builtins(record.adapted),
    )


def _share(size: int, manifest: Manifest) -> float | None:
    """Return a size as a share of the source's, to four digits."""
    whole = manifest.source.get("bytes")
    return float(f"{size / whole:.4g}") if isinstance(whole, int) and whole > 0 else None


def _layers(layers: Mapping[str, Mapping[str, float]]) -> dict[str, float] | None:
    if not layers:
        return None
    found: dict[str, float] = {"count": len(layers)}
    sized = [figures for figures in layers.values() if "bits_per_weight" in figures]
    if weights := sum(figures["weights"] for figures in sized):
        bits = sum(figures["weights"] * figures["bits_per_weight"] for figures in sized) / weights
        found["bits_per_weight"] = float(f"{bits:.4g}")
    errors = [figures["relative_error"] for figures in layers.values() if "relative_error" in figures]
    if errors:
        found["median_relative_error"] = float(f"{statistics.median(errors):.4g}")
    return found


def _summary(manifest: Manifest, layers: Mapping[str, Mapping[str, float]]) -> str:
    """Return in a sentence what the artifact is."""
    source = manifest.source
    done = [record.name for record in manifest.passes]
    done += [record.name for export in manifest.exports for record in export.passes if record.name not in done]
    bits = sorted({int(figures["bits"]) for figures in layers.values() if "bits" in figures})
    parts = [f"{source.get('architecture') or 'A model'} made from {Path(str(source.get('id', '?'))).name}"]
    parts.append(f"by {', '.join(done)}" if done else "unchanged")
    if bits:
        parts.append(f"{' and '.join(map(str, bits))} bits")
    return ", ".join(parts) + f"; for {' and '.join(export.name for export in manifest.exports)}."


def _size_path(manifest: Manifest, exports: Sequence[ExportEntry], gates: Sequence[GateRecord]) -> list[PathStep]:
    steps: list[PathStep] = []
    source = manifest.source.get("bytes")
    if isinstance(source, int):
        steps.append(PathStep(name="source", size_bytes=source, share=1.0, quality={}))
    for record in manifest.passes:
        if record.weight_bytes is not None:
            quality = {name: value for name, value in record.metrics.items() if _is_quality(name)}
            size = record.weight_bytes
            steps.append(PathStep(name=record.name, size_bytes=size, share=_share(size, manifest), quality=quality))
    for entry in exports:
        name = f"export {entry.name}"
        own = [gate for gate in gates if gate.export == entry.name and _measures_quality(gate.metric)]
        quality = {_figure(gate, own): gate.value for gate in own}
        steps.append(PathStep(name=name, size_bytes=entry.size_bytes, share=entry.share, quality=quality))
    return steps


def _figure(gate: GateRecord, gates: Sequence[GateRecord]) -> str:
    """Return the name of what was measured, with that of the test data where the same was measured with others too."""
    name = f"{gate.metric}_{gate.unit}" if gate.unit in {"share", "points", "nats"} else gate.metric
    several = any(one.metric == gate.metric and one.evaluation != gate.evaluation for one in gates)
    return f"{gate.evaluation}_{name}" if several else name


def _measures_quality(name: str) -> bool:
    metric = METRICS.get(name)  # the record may be of another version
    return metric is not None and metric.group == "quality"


def _is_quality(name: str) -> bool:
    return name.startswith("held_out_") and "_after" in name
