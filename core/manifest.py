"""What is recorded of an artifact, in two files.

`llmopt.json`: what it is made of, and how that was proved; the same each time the recipe is built.
`llmopt.run.json`: how the build that made it went: times, memory, the machine, what gates measured. No hash covers it.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

MANIFEST = "llmopt.json"
RUN = "llmopt.run.json"


class FileRecord(msgspec.Struct, frozen=True):
    """A file of the artifact."""

    bytes: int
    sha256: str


class PassRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a pass did.

    Attributes:
        name: the pass.
        params: its parameters, those that were not given included.
        changed: layers or tensors that are different now.
        skipped: (name, reason) of those it left alone.
        metrics: figures, each name ending in its unit.
        notes: sentences for the user.
        allocation: the bits that it chose for layers.
        curve: what it measured as it learnt, each point with its `step`.
        layers: figures of single layers or blocks; of a rounded layer how many `weights` it has, their `bits`,
            `bits_per_weight` with the scales, and `relative_error`: |W - W'| / |W| in the Frobenius norm on a sample of
            rows, W being the weight that the pass was given.
        weight_bytes: bytes of the model's weights after the pass, codes packed without gaps; None where that was not
            recorded, as for passes on graphs.
    """

    name: str
    params: dict[str, Any]
    changed: list[str]
    skipped: list[tuple[str, str]]
    metrics: dict[str, float]
    notes: list[str]
    allocation: dict[str, int] = {}
    curve: list[dict[str, float]] = []
    layers: dict[str, dict[str, float]] = {}
    weight_bytes: int | None = None


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
    """An export, the passes on its graph, and its verification.

    `adapted` is that of base and adapter together, where the artifact has an adapter; `verification` is the base's.
    """

    name: str
    directory: str
    params: dict[str, Any]
    notes: list[str]
    verification: Parity | None
    adapted: Parity | None = None
    passes: list[PassRecord] = []
    files: dict[str, FileRecord]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The whole record.

    Attributes:
        llmopt: version of what made it.
        recipe: as it was given, paths as they were written.
        seed: of everything that was drawn.
        source: the model: what the recipe calls it, its revision on the hub, a hash of its config and weights.
        calibration: the text: what the recipe calls it, a hash, how much of it was taken; None without.
        versions: of Python and the libraries.
        passes: what each did, in order.
        exports: what was written, and how it was verified.
        files: those that belong to no single export.
        limits: what `--max-memory` decides that the last bits depend on: how many tokens ran through a block at a time,
            how many bytes of a mixture's statistics were gathered at a time.
    """

    llmopt: str
    recipe: dict[str, Any]
    seed: int
    source: dict[str, Any]
    calibration: dict[str, Any] | None
    versions: dict[str, str]
    passes: list[PassRecord]
    exports: list[ExportRecord]
    files: dict[str, FileRecord] = {}
    limits: dict[str, int] = {}


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run took place; `memory_bytes` is None where the system does not tell."""

    processor: str
    cores: int
    memory_bytes: int | None
    system: str


class StepRecord(msgspec.Struct, kw_only=True):
    """A part of a run; filled in while it goes on.

    Attributes:
        name: as in the recipe (`rtn`); passes of one sweep together (`smooth + gptq`); `export onnx`, `verify onnx`.
        seconds: by a clock that only goes forward.
        cpu_seconds: of all threads and child processes.
        peak_memory_bytes: largest resident memory of the process while it went on; where the system does not tell the
            present one, the largest since the process began.
        cached: whether the result was taken from the cache.
        blocks_resumed: how many finished blocks were taken over from a run that did not end.
        seconds_saved: what the parts that were taken over took when they were made.
    """

    name: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_bytes: int = 0
    cached: bool = False
    blocks_resumed: int = 0
    seconds_saved: float = 0.0


class GateRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A gate of the recipe, and what was measured for it.

    Attributes:
        text: as written.
        metric: what is measured.
        value: what was measured.
        low: lower end of the confidence interval of `value`; None with too few samples for one.
        high: its upper end.
        limit: what it is compared with.
        comparison: how, such as `<=`.
        unit: of value, interval and limit: "share", "ratio", "points" (a difference of shares, of one), "nats",
            "bytes", "seconds", "tokens_per_second", "sequences_per_second" or "".
        verdict: "undecided" when the interval holds the limit, or there is none.
        samples: how many were measured; 0 for what is counted, as sizes are.
        samples_needed: about how many would decide it; None where it is decided, or that cannot be told.
        against: "source" when it is measured against the source, None when it is absolute.
        export: which one was measured.
        evaluation: name of the test data; None for size and speed.
        confidence: with which `value` lies in its interval.
    """

    text: str
    metric: str
    value: float
    low: float | None
    high: float | None
    limit: float
    comparison: str
    unit: str
    verdict: Literal["passed", "failed", "undecided"]
    samples: int
    samples_needed: int | None = None
    against: Literal["source"] | None = None
    export: str
    evaluation: str | None = None
    confidence: float | None = None


class InputRecord(msgspec.Struct, frozen=True):
    """A file that was read: its size, when it was changed last (ns since 1970), and its hash."""

    path: str
    bytes: int
    mtime_ns: int
    sha256: str


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How the run went that made an artifact.

    Attributes:
        started: when, ISO 8601 in UTC.
        seconds: how long it took.
        cpu_seconds: of all threads and child processes.
        peak_memory_bytes: largest resident memory of the process.
        machine: where.
        threads: how many a computation was divided among.
        steps: in the order in which they ran.
        gates: in the recipe's order.
        inputs: the files that were read.
    """

    started: str
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    machine: Machine
    threads: int
    steps: list[StepRecord]
    gates: list[GateRecord] = []
    inputs: list[InputRecord] = []
