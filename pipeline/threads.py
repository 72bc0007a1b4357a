"""The same bytes on one core and on many."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from ..core.processes import world_size
from ..core.threads import THREADS


@contextmanager
def fixed_threads() -> Generator[None]:
    """Have torch compute on `THREADS` threads meanwhile; see there.

    Processes that train together keep the number they were started with: they share the machine.
    """
    import torch

    before = torch.get_num_threads()
    if world_size() == 1:
        torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)
