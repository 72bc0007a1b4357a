"""Ending the process in time when the main thread does not hear of a signal, being in native code."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 1.4
"""Seconds that the main thread has to tidy up by itself; with what follows it is less than two."""


class Watchman:
    """Reads the numbers of signals as the system delivers them, and ends the process if the first is not heeded.

    Args:
        told: says what happened and returns the exit status.
    """

    def __init__(self, told: Callable[[int], int]) -> None:
        self._told = told
        self._over = threading.Event()
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read,), daemon=True).start()

    def dismiss(self) -> None:
        """Stop watching: the main thread is at its end."""
        self._over.set()
        with suppress(ValueError):
            signal.set_wakeup_fd(self._before)
        os.close(self._write)

    def _watch(self, read: int) -> None:
        first = os.read(read, 1)
        if not first or self._over.wait(PATIENCE):
            os.close(read)
            return
        from .core.ends import undo

        undo()
        os._exit(self._told(first[0]))
