"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


@cache
def _trim_function() -> Any:
    """Return glibc's `malloc_trim`, None where the C library has none."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim() -> None:
    """Return freed heap pages to the system.

    glibc keeps matrices below 32 MiB on its heap when they are freed; between blocks that adds up to a block more.
    """
    function = _trim_function()
    if function is not None:
        function(0)
