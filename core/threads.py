"""How many threads a computation is divided among while an artifact is built.

The last bits of a sum depend on where it was cut, and libraries cut by the number of threads: not only sums, but the
ends of vectors too, where the remainder is computed by other instructions. GPTQ turns such a bit into another code. So
the number is the same on every machine, whatever it has and OMP_NUM_THREADS says: fewer cores take turns.
"""

from __future__ import annotations

import os

THREADS = 8
"""Of torch and of the engines; decision 9 says why it is a constant."""


def take_turns(threads: int) -> bool:
    """Return whether so many threads are more than the process has cores: then one that waits must not spin."""
    return threads > (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
