"""Every metric that can be measured and that a gate can limit: declared once, as data.

A metric of quality is a statistic over columns, which hold a value for each sample; those that compare with the source
read its columns too, `source_loss` beside `loss`, of the same samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..core.errors import UsageError, nearest
from .figures import f1_macro, spearman, weighted_mean
from .intervals import Columns, Statistic

Unit = Literal["", "share", "ratio", "points", "nats", "bytes", "seconds", "tokens_per_second", "sequences_per_second"]
"""`share` is a part of one, `ratio` one figure over the other, `points` the difference of two shares."""

Group = Literal["quality", "size", "speed"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric.

    Attributes:
        about: what it is, in words.
        unit: of its value.
        comparison: the natural direction of a limit.
        group: how it is measured.
        tasks: which tasks give it, for quality.
        source: whether it compares with the source.
        statistic: makes it of the samples' columns, for quality.
        units: the column that says how many things of a sample were right or wrong; `""` for one in each sample;
            None where samples are not right or wrong.
    """

    about: str
    unit: Unit
    comparison: Literal["<=", ">="]
    group: Group
    tasks: tuple[str, ...] = ()
    source: bool = False
    statistic: Statistic | None = None
    units: str | None = None


def _perplexity(prefix: str) -> Statistic:
    return lambda columns: math.exp(weighted_mean(columns[f"{prefix}loss"], columns["tokens"]))


def _increase(columns: Columns) -> float:
    return math.exp(weighted_mean(columns["loss"] - columns["source_loss"], columns["tokens"])) - 1


def _mean(name: str, weights: str | None = None) -> Statistic:
    return lambda columns: weighted_mean(columns[name], columns[weights] if weights else None)


def _f1(prefix: str) -> Statistic:
    return lambda columns: f1_macro(columns["expected"], columns[f"{prefix}predicted"])


def _spearman(prefix: str) -> Statistic:
    return lambda columns: spearman(columns["score"], columns[f"{prefix}similarity"])


def _word_error_rate(prefix: str) -> Statistic:
    return lambda columns: float(columns[f"{prefix}word_edits"].sum() / columns[f"{prefix}words"].sum())


def _drop(higher: Statistic, lower: Statistic) -> Statistic:
    return lambda columns: higher(columns) - lower(columns)


def _share(name: str, about: str, column: str, *tasks: str, units: str | None = "") -> dict[str, Metric]:
    """Return a share, and how far it drops against the source's."""
    own, source = _mean(column), _mean(f"source_{column}")
    return _with_drop(name, about, own, source, *tasks, units=units)


def _with_drop(
    name: str, about: str, own: Statistic, source: Statistic, *tasks: str, units: str | None = None
) -> dict[str, Metric]:
    drop = f"the source's {about} less the artifact's, in points"
    unit: Unit = "share" if units is not None else ""
    return {
        name: Metric(about, unit, ">=", "quality", tasks, statistic=own, units=units),
        f"{name}_drop": Metric(
            drop, "points", "<=", "quality", tasks, source=True, statistic=_drop(source, own), units=units
        ),
    }


def _measured(name: str, about: str, unit: Unit, group: Group) -> dict[str, Metric]:
    """Return a cost, and its ratio to the source's."""
    ratio = name.removesuffix("_seconds") + "_ratio"
    return {
        name: Metric(about, unit, "<=", group),
        ratio: Metric(f"{about}, over the source's", "ratio", "<=", group, source=True),
    }


def _speed(name: str, about: str, unit: Unit) -> dict[str, Metric]:
    speedup = name.removesuffix("_speed") + "_speedup"
    return {
        name: Metric(about, unit, ">=", "speed"),
        speedup: Metric(f"{about}, over the source's", "ratio", ">=", "speed", source=True),
    }


_WRITING = ("generate", "transcribe")

METRICS: dict[str, Metric] = {
    "perplexity": Metric("perplexity of the text", "", "<=", "quality", ("perplexity",), statistic=_perplexity("")),
    "perplexity_increase": Metric(
        "perplexity over the source's, less 1",
        "share",
        "<=",
        "quality",
        ("perplexity",),
        source=True,
        statistic=_increase,
    ),
    "mean_kl": Metric(
        "mean KL divergence from the source",
        "nats",
        "<=",
        "quality",
        ("perplexity",),
        source=True,
        statistic=_mean("kl", "tokens"),
    ),
    "top1_agreement": Metric(
        "positions where the source puts the same token first",
        "share",
        ">=",
        "quality",
        ("perplexity",),
        source=True,
        statistic=_mean("agreement", "tokens"),
        units="tokens",
    ),
    **_share("accuracy", "accuracy", "correct", "multiple-choice", "classify"),
    **_share("accuracy_normalized", "accuracy by likelihood per byte", "correct_normalized", "multiple-choice"),
    **_share("exact_match", "share of answers that match exactly", "exact", "generate"),
    "word_error_rate": Metric(
        "words replaced, left out or added, over those expected",
        "ratio",
        "<=",
        "quality",
        _WRITING,
        statistic=_word_error_rate(""),
        units="words",
    ),
    "word_error_rate_increase": Metric(
        "the artifact's word error rate less the source's, in points",
        "points",
        "<=",
        "quality",
        _WRITING,
        source=True,
        statistic=_drop(_word_error_rate(""), _word_error_rate("source_")),
        units="words",
    ),
    **_with_drop("f1_macro", "mean F1 of the classes", _f1(""), _f1("source_"), "classify"),
    "label_agreement": Metric(
        "samples to which the source gives the same answer",
        "share",
        ">=",
        "quality",
        ("multiple-choice", "classify"),
        source=True,
        statistic=lambda columns: float((columns["predicted"] == columns["source_predicted"]).mean()),
        units="",
    ),
    **_with_drop(
        "spearman", "rank correlation of similarity and score", _spearman(""), _spearman("source_"), "similarity"
    ),
    **_share("ndcg_at_10", "nDCG of the first ten documents", "ndcg", "retrieval", units=None),
    **_measured("size", "bytes of the artifact's files", "bytes", "size"),
    **_measured("load_seconds", "time to load", "seconds", "speed"),
    **_measured("peak_memory", "peak memory of a process that runs it", "bytes", "speed"),
    **_speed("prefill_speed", "speed of reading a prompt", "tokens_per_second"),
    **_speed("decode_speed", "speed of generating text", "tokens_per_second"),
    **_speed("throughput", "texts computed a second", "sequences_per_second"),
}


def metric(name: str, *, where: str) -> Metric:
    """Return a metric by its name.

    Raises:
        UsageError: there is none; the hint names the nearest.
    """
    if name not in METRICS:
        raise UsageError(f"unknown metric `{name}`", where=where, hint=nearest(name, METRICS))
    return METRICS[name]


def metrics_of(task: str, *, source: bool) -> dict[str, Metric]:
    """Return the metrics that a task gives, those against the source only where there is one."""
    return {name: one for name, one in METRICS.items() if task in one.tasks and (source or not one.source)}
