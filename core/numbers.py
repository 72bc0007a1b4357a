"""Numbers as people read them: four significant digits, binary sizes, percent, minutes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

_SIZES = ("B", "KiB", "MiB", "GiB", "TiB")
_COUNTS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float) -> str:
    """Return four significant digits, without an exponent where one can do without."""
    if type(value) is int:
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if not -3 <= exponent <= 8:
        return f"{value:.3g}"
    text = f"{value:,.{max(0, 3 - exponent)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def size(count: float) -> str:
    """Return a number of bytes in KiB, MiB, GiB."""
    value, unit = float(count), 0
    while abs(value) >= 1024 and unit < len(_SIZES) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count:.0f} B" if unit == 0 else f"{number(value)} {_SIZES[unit]}"


def share(value: float) -> str:
    """Return a share of one in percent."""
    return f"{number(100 * value)} %"


def count(value: int) -> str:
    """Return a large count with k, M or G."""
    for factor, unit in _COUNTS:
        if value >= factor:
            return f"{number(value / factor)} {unit}"
    return str(value)


def seconds(value: float) -> str:
    """Return a duration."""
    if value < 9.95:
        return f"{value:.2f} s" if value < 0.995 else f"{value:.1f} s"
    whole = round(value)
    if whole < 100:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def points(value: float) -> str:
    """Return a difference of shares of one in percentage points."""
    return f"{number(100 * value)} points"


_BY_ENDING: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("_bytes", size),
    ("bytes", size),
    ("_seconds", seconds),
    ("seconds", seconds),
    ("_share", share),
    ("_points", points),
    ("agreement", share),
    ("_ms", lambda value: f"{number(value)} ms"),
    ("_nats", lambda value: f"{number(value)} nats"),
    ("per_second", lambda value: f"{number(value)}/s"),
)
_SPELT = {"kl": "KL", "top1": "top-1", "gpus": "GPUs", "stderr": "standard error"}
_RATE = re.compile(r"(?:(?P<of>\w+)_)?(?P<unit>tokens|sequences)_per_second")


def labelled(name: str, value: Any) -> tuple[str, str]:
    """Return a label and a text for one entry of a report; the unit is the end of its name."""
    if rate := _RATE.fullmatch(name):
        return rate["of"] or "speed", plain(name, value)
    label = name.replace("_", " ")
    for unit in ("bytes", "seconds", "ms", "nats", "share", "points"):
        label = label.removesuffix(f" {unit}")
    return " ".join(_SPELT.get(word, word) for word in label.split(" ")), plain(name, value)


def plain(name: str, value: Any) -> str:
    """Return the text of a value whose name tells its unit."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        if rate := _RATE.fullmatch(name):
            return f"{number(value)} {rate['unit']}/s"
        for ending, write in _BY_ENDING:
            if name.endswith(ending):
                return write(value)
        return number(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(plain("", item) for item in cast("Sequence[Any]", value)) or "-"
    if isinstance(value, dict):
        pairs = cast("dict[str, Any]", value).items()
        return ", ".join(f"{key} {plain(key, item)}" for key, item in pairs) or "-"
    return str(value)


_BY_UNIT: dict[str, Callable[[float], str]] = {
    "share": share,
    "points": points,
    "nats": lambda value: f"{number(value)} nats",
    "bytes": size,
    "seconds": seconds,
    "tokens_per_second": lambda value: f"{number(value)} tokens/s",
    "sequences_per_second": lambda value: f"{number(value)} sequences/s",
}


def in_unit(value: float, unit: str) -> str:
    """Return a figure with its unit, as metrics declare it; a unit of "" or "ratio" is a plain number."""
    return _BY_UNIT.get(unit, number)(value)
