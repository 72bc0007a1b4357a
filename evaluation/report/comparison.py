"""Several artifacts side by side: a table, and plots of size, quality and latency."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.numbers import number, share, size
from . import charts
from .document import ArtifactEntry, ExportEntry, Point, Report
from .markup import Child, Markup, element
from .tables import or_dash, table, verdict

_HEADER = (
    "Artifact",
    "Export",
    "Size",
    "Of source",
    "Bits per weight",
    "Median error",
    "Verified",
    "KL to its model, nats",
    "Perplexity",
    "Tokens/s",
)


def comparison(report: Report) -> Markup:
    """Return a table with a row for each export, and the plots of size, quality and latency."""
    rows = [_row(entry, export) for entry in report.artifacts for export in entry.exports]
    made = table(_HEADER, rows, numbers={2, 3, 4, 5, 7, 8, 9})
    return element("section", element("h2", "Side by side"), made, _plots(report))


def _row(entry: ArtifactEntry, export: ExportEntry) -> Sequence[Child]:
    checked, layers = export.verification or {}, entry.layers or {}
    scores = next((one.figures for one in entry.evaluations if one.export == export.name), {})
    speed = next((one.figures for one in entry.speeds if one.export == export.name), {})
    perplexity = scores.get("perplexity")
    return [
        entry.name,
        export.name,
        size(export.size_bytes),
        or_dash(export.share, share),
        or_dash(layers.get("bits_per_weight"), number),
        or_dash(layers.get("median_relative_error"), share),
        verdict(export),
        or_dash(checked.get("mean_kl"), number),
        or_dash(perplexity and perplexity.value, number),
        or_dash(speed.get("decode_tokens_per_second", speed.get("tokens_per_second")), number),
    ]


def _plots(report: Report) -> Markup:
    unit, factor = _unit(max((point.size_bytes for point in report.points), default=1))
    by_size = charts.Measure(f"size, {unit}", lambda point: point.size_bytes / factor)
    by_quality = charts.Measure(report.quality or "", lambda point: point.quality)
    by_latency = charts.Measure(f"ms for {report.latency}", lambda point: point.latency_ms)
    wanted = (
        ("Size and quality", by_size, by_quality),
        ("Latency and quality", by_latency, by_quality),
        ("Size and latency", by_size, by_latency),
    )
    shown = [made for title, across, up in wanted if (made := _plot(title, report.points, across, up)) is not None]
    if not shown:
        said = "Give measurements with --eval and --bench to see quality and speed against size."
        return element("p", said, class_="soft")
    return element("div", shown, class_="plots")


def _plot(title: str, points: Sequence[Point], across: charts.Measure, up: charts.Measure) -> Markup | None:
    """Return a plot of the points that have both figures; None where there are not two of them."""
    known = [point for point in points if across.of(point) is not None and up.of(point) is not None]
    if len(known) < 2:
        return None
    return element("figure", element("figcaption", title, class_="over"), charts.scatter(title, known, across, up))


def _unit(most: float) -> tuple[str, float]:
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    at = next((at for at in range(len(units) - 1) if most < 1024 ** (at + 1)), len(units) - 1)
    return units[at], 1024.0**at
