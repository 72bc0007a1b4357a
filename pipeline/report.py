"""`llmopt report`: everything that is known of artifacts, gathered into one document."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec

from ..core.errors import LlmoptError, UsageError
from ..core.manifest import MANIFEST, ExportRecord, GateRecord, Manifest, PassRecord
from ..evaluation.metrics import METRICS
from ..evaluation.report.document import (
    ArtifactEntry,
    ExportEntry,
    PassEntry,
    PathStep,
    Point,
    Report,
    Skipped,
)
from .artifact import existing_folder, read_manifest, read_run
from .layer_maps import layer_maps, rounded_layers
from .loading import snippets
from .measured import Measured, read_measured
from .parts import folder_parts

_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class _Artifact:
    """An artifact to report on: its folder as given, a name that tells it from the others, and its manifest."""

    path: str
    name: str
    root: Path
    manifest: Manifest


def make_report(paths: Sequence[str], *, evals: Sequence[Path] = (), benches: Sequence[Path] = ()) -> Report:
    """Gather what is known of artifacts.

    Args:
        paths: folders that llmopt wrote.
        evals: files that `llmopt eval --json` printed.
        benches: files that `llmopt bench --json` printed.

    Raises:
        UsageError: a folder is no artifact, or a file holds no measurements.
        LlmoptError: a manifest or a graph is damaged.
    """
    found = [existing_artifact(path) for path in paths]
    names = _names([root for root, _ in found])
    artifacts = [
        _Artifact(path, name, root, manifest) for path, name, (root, manifest) in zip(paths, names, found, strict=True)
    ]
    measured = read_measured(evals, benches)
    places = [(one.root, one.manifest) for one in artifacts]
    entries = [
        artifact_entry(one.manifest, one.root, name=one.name, path=one.path, measured=measured) for one in artifacts
    ]
    used = {item.path for entry in entries for item in [*entry.evaluations, *entry.speeds]}
    measured.check_used(used, places)
    quality, latency, points = _points(entries)
    return Report(llmopt=_version(), artifacts=entries, quality=quality, latency=latency, points=points)


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


def existing_artifact(path: str) -> tuple[Path, Manifest]:
    """Return the folder of an artifact, and its manifest.

    Raises:
        UsageError: it is none of ours.
        LlmoptError: its manifest is damaged.
    """
    folder = existing_folder(path)
    manifest = read_manifest(folder)
    if manifest is not None:
        return folder, manifest
    above = folder.resolve().parent
    hint = f"did you mean the artifact it lies in, {above}?" if (above / MANIFEST).is_file() else None
    raise UsageError(
        f"`{path}` is no artifact of llmopt",
        where=f"there is no {MANIFEST} in it",
        hint=hint or "give a folder that llmopt wrote",
    )


def _names(roots: Sequence[Path]) -> list[str]:
    """Return a name for each artifact: its folder's, with as many folders above it as tell them apart."""
    resolved = [root.resolve() for root in roots]
    if len(set(resolved)) < len(resolved):
        raise UsageError("the same artifact was given twice", hint="name each folder once")
    depth = 1
    while len({place.parts[-depth:] for place in resolved}) < len(resolved):
        depth += 1
    return ["/".join(place.parts[-depth:]) for place in resolved]


def _version() -> str:
    from importlib.metadata import version

    return version("llmopt")


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
    name = f"{gate.metric}_{gate.unit}" if gate.unit in {"share", "nats"} else gate.metric
    several = any(one.metric == gate.metric and one.evaluation != gate.evaluation for one in gates)
    return f"{gate.evaluation}_{name}" if several else name


def _measures_quality(name: str) -> bool:
    metric = METRICS.get(name)  # the record may be of another version
    return metric is not None and metric.group == "quality"


def _is_quality(name: str) -> bool:
    return name.startswith("held_out_") and "_after" in name


def _points(entries: Sequence[ArtifactEntry]) -> tuple[str | None, str | None, list[Point]]:
    """Return what is plotted: quality and latency as far as they were measured, and the points."""
    several = any(len(entry.exports) > 1 for entry in entries)
    points = [
        _point(f"{entry.name} ({export.name})" if several else entry.name, entry, export.name, export.size_bytes)
        for entry in entries
        for export in entry.exports
    ]
    points += _sources(entries)
    if len(points) < 2:
        return None, None, []
    measured = any(point.quality is not None for point in points)
    kinds = [kind for entry in entries for one in entry.speeds if (kind := _latency(one.figures)[1]) is not None]
    return "perplexity" if measured else None, kinds[0] if kinds else None, points


def _point(name: str, entry: ArtifactEntry, export: str | None, size: int) -> Point:
    """Return the point of an export, or of the source where `export` is None."""
    own = [one.figures for one in entry.evaluations if one.export == export]
    figures = [one["perplexity"] for one in own if "perplexity" in one]
    if export is None:  # an artifact's evaluation measures its source beside it
        figures += [one.figures["source_perplexity"] for one in entry.evaluations if "source_perplexity" in one.figures]
    latencies = [_latency(one.figures)[0] for one in entry.speeds if one.export == export]
    return Point(
        name=name,
        is_source=export is None,
        size_bytes=size,
        quality=figures[0].value if figures else None,
        quality_low=figures[0].low if figures else None,
        quality_high=figures[0].high if figures else None,
        latency_ms=latencies[0] if latencies else None,
    )


def _latency(figures: Mapping[str, float]) -> tuple[float | None, str | None]:
    """Return milliseconds, and of what: a generated token, or a batch of texts."""
    if rate := figures.get("decode_tokens_per_second"):
        return float(f"{1000 / rate:.4g}"), "a generated token"
    if seconds := figures.get("p50_batch_seconds"):
        return float(f"{1000 * seconds:.4g}"), "a batch of texts"
    return None, None


def _sources(entries: Sequence[ArtifactEntry]) -> list[Point]:
    """Return a point for each source that was measured, by itself or beside an artifact."""
    points: dict[str, Point] = {}
    for entry in entries:
        size, name = entry.source.get("bytes"), str(entry.source.get("id", ""))
        if isinstance(size, int) and name not in points:
            made = _point(Path(name).name, entry, None, size)
            if made.quality is not None or made.latency_ms is not None:
                points[name] = made
    return list(points.values())


def _portable(entry: ArtifactEntry) -> ArtifactEntry:
    """Return the entry as the artifact's own model card has it: code that loads it starts from its folder."""
    root = Path(entry.path)
    manifest = read_manifest(root.expanduser())
    assert manifest is not None, "it was read for the report"
    made = artifact_entry(manifest, root.expanduser(), name=entry.name, path=".")
    return msgspec.structs.replace(entry, exports=made.exports)


def write_report(report: Report, path: Path) -> None:
    """Write a report as a page (.html) or as Markdown (.md); the file appears whole or not at all.

    Raises:
        UsageError: another ending, or it cannot be written.
    """
    from ..evaluation.report.card import card
    from ..evaluation.report.page import page

    if path.suffix.lower() in (".html", ".htm"):
        text = page(report)
    elif path.suffix.lower() == ".md" and len(report.artifacts) == 1:
        text = card(_portable(report.artifacts[0]))
    elif path.suffix.lower() == ".md":
        raise UsageError("a model card is of one artifact", hint="give one folder, or name a page, .html")
    else:
        raise UsageError(
            f"cannot tell what to write from `{path.name}`", hint="name a page, .html, or a model card, .md"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.partial")
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        hint = "give another file with -o"
        raise UsageError(f"cannot write to `{path}`", where=error.strerror, hint=hint) from None
