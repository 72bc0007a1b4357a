"""How many threads a computation is divided among while an artifact is built.

The last bits of a sum depend on where it was cut, and libraries cut by the number of threads: not only sums, but the
ends of vectors too, where the remainder is computed by other instructions. GPTQ turns such a bit into another code. So
the number belongs to the recipe, and is the same on every machine, whatever it has and OMP_NUM_THREADS says: fewer
cores take turns.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

DEFAULT = 4
"""Where the recipe names no number; decision 9 tells why it is no larger, and does not follow the machine."""

_numbers = [DEFAULT]


def threads() -> int:
    """Return how many threads torch and the engines compute on now."""
    return _numbers[-1]


@contextmanager
def fixed(number: int) -> Generator[None]:
    """Compute on so many threads meanwhile."""
    _numbers.append(number)
    try:
        yield
    finally:
        _numbers.pop()


def cores() -> int:
    """Return how many cores the process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def take_turns(number: int) -> bool:
    """Return whether so many threads are more than the process has cores: then one that waits must not spin."""
    return number > cores()
