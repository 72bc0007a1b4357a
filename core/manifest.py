"""`llmopt.json`: what an artifact is made of, and how that was proved. No times, so that builds repeat."""

from __future__ import annotations

from typing import Any

import msgspec

MANIFEST = "llmopt.json"


class FileRecord(msgspec.Struct, frozen=True):
    """A file of the artifact."""

    bytes: int
    sha256: str


class PassRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a pass did; `allocation` are the bits that it chose for layers, `curve` what it measured as it learnt."""

    name: str
    params: dict[str, Any]
    changed: list[str]
    skipped: list[tuple[str, str]]
    metrics: dict[str, float]
    notes: list[str]
    allocation: dict[str, int] = {}
    curve: list[dict[str, float]] = []


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """How near an artifact, opened in its own runtime, is to the model that was exported.

    Attributes:
        runtime: what opened it, with its version.
        samples: what was compared: "held-out calibration text", "random token ids"…
        positions: number of output rows compared.
        weights_equal: whether every code and scale read back was equal bit for bit; None when the format keeps none.
        max_difference: largest absolute difference of an output value.
        mean_kl: mean Kullback-Leibler divergence, nats a position; None where outputs are no logits.
        top1_agreement: share of positions with the same largest logit.
        mean_cosine_distance: mean of 1 - cosine of two output vectors.
        tolerance: the limits that were applied, by name of the figure.
        passed: whether all figures are within their limits.
    """

    runtime: str
    samples: str
    positions: int
    weights_equal: bool | None
    max_difference: float
    mean_kl: float | None
    top1_agreement: float | None
    mean_cosine_distance: float | None = None
    tolerance: dict[str, float]
    passed: bool


class ExportRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An export, the passes on its graph, and its verification."""

    name: str
    directory: str
    params: dict[str, Any]
    notes: list[str]
    verification: Parity | None
    passes: list[PassRecord] = []
    files: dict[str, FileRecord]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The whole record; `files` are those that belong to no single export."""

    llmopt: str
    recipe: dict[str, Any]
    seed: int
    source: dict[str, Any]
    calibration: dict[str, Any] | None
    versions: dict[str, str]
    passes: list[PassRecord]
    exports: list[ExportRecord]
    files: dict[str, FileRecord] = {}
