"""Choosing layers by name: globs, or regular expressions after `re:`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from .errors import UsageError, nearest


def matches(name: str, pattern: str) -> bool:
    r"""Return whether `name`, or one of its parents, matches `pattern`.

    `lm_head`, `*.down_proj` and `model.layers.0` are globs; `re:.*layers\.[0-3]\..*` is a regular expression for the
    whole name.
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    if fnmatchcase(name, pattern):
        return True
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts)))


def check_patterns(patterns: Sequence[str], names: Iterable[str], *, where: str) -> None:
    """Refuse a pattern that matches nothing: a typing error would otherwise quantize what should be left alone.

    Raises:
        UsageError: a pattern is no regular expression, or matches none of `names`.
    """
    known = list(names)
    for pattern in patterns:
        try:
            found = any(matches(name, pattern) for name in known)
        except re.error as error:
            hint = "mend it, or use a glob such as `*.down_proj`"
            raise UsageError(f"`{pattern}` is not a regular expression", where=f"{where}\n{error}", hint=hint) from None
        if not found:
            leaf = pattern.split(".")[-1].lstrip("*")
            hint = nearest(leaf, {name.split(".")[-1] for name in known})
            raise UsageError(f"pattern `{pattern}` matches no layer", where=where, hint=hint)
