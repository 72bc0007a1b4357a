"""The same bytes on one core and on many."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from ..core.processes import world_size
from ..core.threads import fixed


@contextmanager
def fixed_threads(number: int) -> Generator[None]:
    """Have torch and the engines compute on so many threads meanwhile; see `core.threads`.

    Processes that train together keep the number they were started with: they share the machine.
    """
    import torch

    before = torch.get_num_threads()
    with fixed(number):
        if world_size() == 1:
            torch.set_num_threads(number)
        try:
            yield
        finally:
            torch.set_num_threads(before)
