"""`llmopt report`: everything that is known of artifacts, gathered into one document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..core.errors import UsageError
from ..core.manifest import MANIFEST, Manifest
from ..evaluation.report.document import ArtifactEntry, Point, Report
from .artifact import existing_folder, read_manifest
from .entry import artifact_entry
from .measured import read_measured


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
