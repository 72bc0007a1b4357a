"""How much pruning takes away, as people write it: a number, or a share with a percent sign."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..core.errors import UsageError

_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s?%")


def share(text: str, *, where: str) -> float:
    """Return the share that a text such as `30%` stands for, above 0 and below 1.

    Raises:
        UsageError: it is none.
    """
    found = _PERCENT.fullmatch(text.strip())
    if found is None or not 0 < float(found[1]) < 100:
        raise UsageError(
            f"cannot read the share `{text}`", where=where, hint="write a percentage above 0% and below 100%, as 30%"
        )
    return float(found[1]) / 100


def amount(text: str | int, total: int, *, where: str) -> int:
    """Return how many of `total` things a number such as `4` or a share such as `25%` stands for, at least 1.

    Raises:
        UsageError: it is neither, takes all of them, or so small a share that it takes none.
    """
    written = str(text).strip()
    count = int(written) if written.isdigit() else round(share(written, where=where) * total)
    if not 0 < count < total:
        raise UsageError(
            f"`{text}` of {total} leaves {'nothing' if count else 'everything as it is'}",
            where=where,
            hint=f"take away at least 1 and at most {total - 1}" if total > 1 else "there is nothing to take away",
        )
    return count


def is_amount(text: str | int) -> bool:
    """Return whether a value can be read as a number or a share."""
    return str(text).strip().isdigit() or _PERCENT.fullmatch(str(text).strip()) is not None


def lowest(scores: Sequence[float], count: int) -> list[int]:
    """Return the places of the `count` lowest scores, rising; of equal ones the first."""
    return sorted(sorted(range(len(scores)), key=lambda index: (scores[index], index))[:count])
