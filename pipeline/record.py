"""How a run goes: what each step takes, in time and memory."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from ..core.manifest import GateRecord, InputRecord, RunRecord, StepRecord
from .machine import machine

_INTERVAL = 0.05
"""Seconds from one look at the resident memory to the next."""

_STATM = Path("/proc/self/statm")


class Recorder:
    """Begins when it is made, and takes down what each step of a run takes.

    Attributes:
        steps: those that have ended, in the order in which they began.
        gates: what was measured for the recipe's gates.
    """

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.gates: list[GateRecord] = []
        self._started = datetime.now(UTC)
        self._clock, self._cpu = time.monotonic(), _cpu_seconds()

    @contextmanager
    def step(self, name: str) -> Generator[StepRecord]:
        """Take down what is done meanwhile; what else is known of the step may be written to the record it gives.

        A step that fails is not kept.
        """
        made = StepRecord(name=name)
        clock, cpu, largest = time.monotonic(), _cpu_seconds(), largest_bytes()
        with _watched() as seen:
            yield made
        made.seconds = time.monotonic() - clock
        made.cpu_seconds = _cpu_seconds() - cpu
        # A look now and then may miss the peak; the system does not, if it was the largest so far.
        made.peak_memory_bytes = now if (now := largest_bytes()) > largest else max(seen, default=now)
        self.steps.append(made)

    def finish(self, inputs: Sequence[InputRecord] = ()) -> RunRecord:
        """Return the record of the run so far, which read `inputs`."""
        import torch

        return RunRecord(
            started=self._started.isoformat(timespec="seconds"),
            seconds=time.monotonic() - self._clock,
            cpu_seconds=_cpu_seconds() - self._cpu,
            peak_memory_bytes=largest_bytes(),
            machine=machine(),
            threads=torch.get_num_threads(),
            steps=self.steps,
            gates=self.gates,
            inputs=list(inputs),
        )


@contextmanager
def _watched() -> Generator[list[int]]:
    """Look at the resident memory now and then; the list it gives holds the largest that was seen, in bytes."""
    seen: list[int] = []
    if not _STATM.is_file():
        yield seen
        return
    ended = threading.Event()

    def look() -> None:
        seen[:] = [max(*seen, resident_bytes(), 0)]

    def watch() -> None:
        while not ended.wait(_INTERVAL):
            look()

    look()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
    look()


def resident_bytes() -> int:
    """Return the memory that the process has now, on Linux."""
    return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def largest_bytes() -> int:
    """Return the most memory that the process has had, 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system
