"""The document that a report is made of: plain data. The page shows no number that is not in it."""

from __future__ import annotations

from typing import Any

import msgspec

from ...core.manifest import RunRecord

_Record = dict[str, Any]


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """A figure, and between which two it lies where that is known."""

    value: float
    low: float | None = None
    high: float | None = None


class Skipped(msgspec.Struct, frozen=True, kw_only=True):
    """What a pass left alone for one reason: how many, the first names, and how many more there are."""

    reason: str
    count: int
    names: list[str]
    more: int


class PassEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What a pass did; see `core.manifest.PassRecord`. `export` is set for a pass on one export's graph."""

    name: str
    export: str | None
    params: dict[str, str]
    changed: int
    left_out: int
    skipped: list[Skipped]
    metrics: dict[str, float]
    notes: list[str]
    curve: list[dict[str, float]]


class Snippet(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine loads an export: lines to copy."""

    engine: str
    language: str
    code: str


class ExportEntry(msgspec.Struct, frozen=True, kw_only=True):
    """An export.

    Attributes:
        name: of the exporter.
        directory: inside the artifact; "." where it is the artifact.
        files: how many.
        size_bytes: of all of them.
        share: of the source's bytes.
        parts: bytes of the weights by part; `files` is what lies beside them. Empty where the files are not here.
        notes: sentences of the exporter.
        verification: figures, see `core.manifest.Parity`; None where there is none.
        adapted: the same of the export with its adapter; None where it has none.
        load: how to load it.
    """

    name: str
    directory: str
    files: int
    size_bytes: int
    share: float | None
    parts: dict[str, int]
    notes: list[str]
    verification: _Record | None
    load: list[Snippet]
    adapted: _Record | None = None


class PathStep(msgspec.Struct, frozen=True, kw_only=True):
    """The model's size after a step, and what is known of its quality there (names end in units)."""

    name: str
    size_bytes: int
    share: float | None
    quality: dict[str, float]


class LayerMap(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of the layers of a stack: a row for each block, a column for each kind of product.

    Attributes:
        figure: "relative_error" or "bits".
        stack: what the blocks are in, such as `model.layers`.
        blocks: their numbers.
        kinds: names of the products inside a block; experts are one kind, of which the largest figure is shown.
        cells: figures by block and kind; None where there is none.
        low: the least of them.
        high: the largest.
        highest: name of the layer with the largest.
    """

    figure: str
    stack: str
    blocks: list[int]
    kinds: list[str]
    cells: list[list[float | None]]
    low: float
    high: float
    highest: str


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What `llmopt eval` measured of an artifact's export, or of its source (`export` is None).

    `confidence` is that of the intervals; names of figures end in units.
    """

    path: str
    export: str | None
    runtime: str
    data: str
    confidence: float = 0.95
    figures: dict[str, Interval]


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """What `llmopt bench` measured, of an export or of the source (`export` is None); figures end in units."""

    path: str
    export: str | None
    runtime: str
    figures: dict[str, float]
    machine: dict[str, Any]


class ArtifactEntry(msgspec.Struct, frozen=True, kw_only=True):
    """An artifact.

    Attributes:
        name: tells it from the others of the report.
        path: as it was given.
        llmopt: the version that built it.
        summary: what it is, in a sentence.
        source: the model it was made of, see `core.manifest.Manifest`.
        calibration: the text that statistics were taken from.
        recipe: as YAML.
        seed: of the build.
        passes: what was done.
        layers: how many layers were rounded, their bits on average, the median of their errors; None where none were.
        exports: what was written.
        size_path: the size after each step.
        maps: figures layer by layer.
        run: times and memory of the build, see `core.manifest.RunRecord`; None where the file is not there.
        evaluations: of `--eval` files.
        speeds: of `--bench` files.
        task: what the recipe says that the model is used for; None where it does not.
        versions: of the libraries at the build.
        warnings: what the reader should know.
    """

    name: str
    path: str
    llmopt: str
    summary: str
    source: _Record
    calibration: _Record | None
    recipe: str
    seed: int
    passes: list[PassEntry]
    layers: dict[str, float] | None
    exports: list[ExportEntry]
    size_path: list[PathStep]
    maps: list[LayerMap]
    run: RunRecord | None
    evaluations: list[Evaluation]
    speeds: list[Speed]
    versions: dict[str, str]
    warnings: list[str]
    task: str | None = None


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """An export, or a source model, in a plot of several."""

    name: str
    is_source: bool
    size_bytes: int
    quality: float | None
    quality_low: float | None
    quality_high: float | None
    latency_ms: float | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The document.

    Attributes:
        llmopt: the version that made it.
        artifacts: in the order in which they were given.
        quality: what the plots show as quality: "perplexity" or "mean_kl_nats"; None where nothing was measured.
        latency: what they show as latency, in words; None where nothing was measured.
        points: of the plots; none where there is nothing to plot.
    """

    llmopt: str
    artifacts: list[ArtifactEntry]
    quality: str | None
    latency: str | None
    points: list[Point]
