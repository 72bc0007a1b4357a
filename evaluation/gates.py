"""Gates: limits that an artifact must meet, and what is made of a measurement and its interval.

A gate passes when its whole interval lies within the limit, fails when the whole interval lies outside, and is
undecided in between: then the samples do not suffice to say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from ..core.errors import UsageError
from ..core.manifest import GateRecord
from ..core.numbers import in_unit
from ..core.quantities import parse_size
from .intervals import FEWEST, samples_needed
from .metrics import METRICS, Metric, metric

Comparison = Literal["<=", ">="]
_GATE = re.compile(
    r"(?:(?P<export>[\w-]+):)?\s*(?P<metric>[\w-]+)(?:@(?P<evaluation>[\w.-]+))?"
    r"\s*(?P<comparison><=|>=|=|<|>)\s*(?P<limit>\S.*)"
)
_NUMBER = re.compile(r"([+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([%a-zA-Z/]*)")
_UNITS: dict[str, dict[str, float]] = {
    "": {"": 1},
    "share": {"": 1, "%": 0.01},
    "points": {"": 1, "%": 0.01},
    "ratio": {"": 1, "%": 0.01, "x": 1},
    "nats": {"": 1, "nats": 1},
    "bytes": {"": 1, "B": 1},
    "seconds": {"": 1, "s": 1, "ms": 0.001, "min": 60},
    "tokens_per_second": {"": 1, "/s": 1, "tokens/s": 1},
    "sequences_per_second": {"": 1, "/s": 1, "sequences/s": 1},
}
_FORM = "write METRIC<=LIMIT or METRIC>=LIMIT, as perplexity_increase<=2% or size_ratio<=0.35"


@dataclass(frozen=True, slots=True)
class Gate:
    """A limit on a metric.

    Attributes:
        text: as it was written.
        name: of the metric.
        comparison: `<=` for a largest value, `>=` for a smallest.
        limit: in the metric's unit; shares are parts of one.
        export: the only export it is for, all when None.
        evaluation: the only test data that it is measured with, all that give its metric when None.
    """

    text: str
    name: str
    comparison: Comparison
    limit: float
    export: str | None = None
    evaluation: str | None = None

    @property
    def metric(self) -> Metric:
        """What is measured."""
        return METRICS[self.name]


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric as it was found.

    Attributes:
        value: the figure.
        interval: what it lies in; None where there are too few samples to say.
        samples: how many it rests on; 0 for what is counted, not sampled.
    """

    value: float
    interval: tuple[float, float] | None
    samples: int


def parse_gate(text: str, *, where: str) -> Gate:
    """Read a gate such as `size<=2GiB`, `onnx-genai:decode_speedup>=1.5` or `accuracy@mmlu>=60%`.

    Args:
        text: the gate.
        where: the option or the place in the recipe, for messages.

    Raises:
        UsageError: another form, an unknown metric, a limit that the metric cannot have, or the wrong way round.
    """
    found = _GATE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"cannot read the gate `{text}`", where=where, hint=_FORM)
    name, comparison = found["metric"].replace("-", "_"), found["comparison"]
    declared = metric(name, where=f"{where}: {text}")
    if comparison != declared.comparison:
        verb = "at most" if declared.comparison == "<=" else "at least"
        raise UsageError(
            f"`{name}` cannot be limited with `{comparison}`",
            where=f"{where}: {text}",
            hint=f"write {name}{declared.comparison}{found['limit']}, which asks for {verb} that",
        )
    if found["evaluation"] is not None and declared.group != "quality":
        hint = f"leave @{found['evaluation']} out"
        raise UsageError(f"`{name}` is not measured with test data", where=f"{where}: {text}", hint=hint)
    limit = _limit(found["limit"], declared, where=f"{where}: {text}")
    return Gate(text.strip(), name, declared.comparison, limit, found["export"], found["evaluation"])


def _limit(text: str, declared: Metric, *, where: str) -> float:
    unit = declared.unit
    if unit == "bytes" and re.fullmatch(r"[\d.]+\s*[kmgtKMGT]i?B?", text):
        return float(parse_size(text))
    found = _NUMBER.fullmatch(text)
    units = _UNITS[unit]
    if found is None or found[2] not in units or not math.isfinite(float(found[1])):
        known = {"bytes": "2GiB", "share": "2%", "points": "1%", "ratio": "0.35", "seconds": "2s"}.get(unit, "12.5")
        raise UsageError(f"`{text}` is no limit of this metric", where=where, hint=f"write it like {known}")
    value = float(found[1]) * units[found[2]]
    if unit in {"share", "points"} and not found[2] and value > 1:
        raise UsageError(f"`{text}` is more than everything", where=where, hint=f"write {text}% for percent")
    return value


def gates_of(raw: Any, *, where: str) -> tuple[str, ...]:
    """Read a recipe's gates: a list of texts, or a mapping from metrics to limits in their natural direction.

    Returns:
        The gates as texts, checked.

    Raises:
        UsageError: it is neither, or a gate cannot be read.
    """
    if raw is None:
        return ()
    if isinstance(raw, Mapping):
        texts = [_from_pair(str(key), value, where) for key, value in cast("Mapping[Any, Any]", raw).items()]
    elif isinstance(raw, list | tuple) and all(isinstance(item, str) for item in cast("list[Any]", raw)):
        texts = list(cast("list[str]", raw))
    else:
        hint = 'write `gates: {perplexity_increase: "2%", size_ratio: 0.35}` or a list of texts'
        raise UsageError("gates are a mapping or a list", where=where, hint=hint)
    for text in texts:
        parse_gate(text, where=where)
    return tuple(texts)


def _from_pair(key: str, value: Any, where: str) -> str:
    export, colon, name = key.rpartition(":")
    declared = metric(name.partition("@")[0].strip(), where=where)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"`{value}` is no limit", where=f"{where}, {key}", hint='write a number, or a text as "2%"')
    return f"{export}{colon}{name.strip()}{declared.comparison}{value}"


def judge(
    gate: Gate, measured: Measured, *, export: str, evaluation: str | None = None, confidence: float | None = None
) -> GateRecord:
    """Compare a measurement with a gate; `confidence` is that of its interval, `evaluation` names the test data."""
    low, high = measured.interval or (-math.inf, math.inf)
    at_most = gate.comparison == "<="
    if math.isnan(measured.value):
        verdict = "failed"
    elif (high <= gate.limit) if at_most else (low >= gate.limit):
        verdict = "passed"
    elif (low > gate.limit) if at_most else (high < gate.limit):
        verdict = "failed"
    else:
        verdict = "undecided"
    needed = None
    if verdict == "undecided":
        few = measured.interval is None
        needed = FEWEST if few else samples_needed(measured.value, low, high, gate.limit, measured.samples)
    return GateRecord(
        text=gate.text,
        metric=gate.name,
        value=measured.value,
        low=None if measured.interval is None else low,
        high=None if measured.interval is None else high,
        limit=gate.limit,
        comparison=gate.comparison,
        unit=gate.metric.unit,
        verdict=cast("Any", verdict),
        samples=measured.samples,
        samples_needed=needed,
        against="source" if gate.metric.source else None,
        export=export,
        evaluation=evaluation,
        confidence=confidence if measured.samples else None,
    )


def label(record: GateRecord) -> str:
    """Return the gate as it was written, the export, and the test data it was measured with."""
    beside = record.export if record.evaluation is None else f"{record.export}, {record.evaluation}"
    return f"{record.text} ({beside})"


def in_words(record: GateRecord) -> str:
    """Return what was measured for a gate, in a line."""
    parts = [f"{record.verdict}: {record.metric} {in_unit(record.value, record.unit)}"]
    if record.samples:
        inside = record.low is not None and record.high is not None
        low, high = (in_unit(one or 0.0, record.unit) for one in (record.low, record.high))
        parts.append(f"between {low} and {high}" if inside else f"no interval with fewer than {FEWEST} samples")
        parts.append(f"{record.samples} samples")
    if record.samples_needed:
        parts.append(f"{record.samples_needed} would decide")
    return ", ".join(parts)
