"""Amounts as people write them."""

from __future__ import annotations

import re

from .errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?B)?", re.IGNORECASE)
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*(%)?")


def parse_size(text: str, *, where: str | None = None) -> int:
    """Return a number of bytes written as `2GiB`, `800 MB` or `1.5G` (binary, as is a unit without B).

    Raises:
        UsageError: it is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"`{text}` is no amount of memory", where=where, hint="write it as 2GiB or 800MiB")
    base = 1000 if (found[3] or "").upper() == "B" else 1024
    return int(float(found[1]) * base ** ("KMGT".index(found[2].upper()) + 1))


def parse_share(text: str, *, where: str) -> float:
    """Return a share written as `95%` or `0.95`, above 0 and below 1.

    Raises:
        UsageError: it is none.
    """
    found = _SHARE.fullmatch(text.strip())
    value = 0.0 if found is None else float(found[1]) / (100 if found[2] else 1)
    if not 0 < value < 1:
        raise UsageError(f"bad value for {where}: {text}", where="expected a share below 100%", hint="write it as 95%")
    return value
