"""What must be gone when the process ends early, even if the main thread never hears of it.

A signal reaches Python code between two of its instructions, and there may be minutes between them: a product, a graph
that an engine compiles. Whoever makes something that must not stay says here how to undo it, and the watchman of the
command line does so when the main thread has not come to it in time.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

_actions: list[Callable[[], object]] = []

whole = threading.RLock()
"""Held while something is done that must not be half done: the process does not end meanwhile."""


@contextmanager
def undone_by(action: Callable[[], object]) -> Generator[None]:
    """Have `action` called, in another thread, if the process must end while this lasts.

    It may be called beside the usual tidying, so that must lie inside.
    """
    _actions.append(action)
    try:
        yield
    finally:
        _actions.remove(action)


def undo() -> None:
    """Undo everything, the latest first; what fails leaves the others."""
    with whole:
        for action in reversed(_actions.copy()):
            with suppress(Exception):
                action()


@contextmanager
def scratch(prefix: str = "llmopt-", folder: Path | None = None) -> Generator[Path]:
    """Have a folder that is gone afterwards, however the process ends, unless it is killed."""
    made = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    with undone_by(lambda: shutil.rmtree(made, ignore_errors=True)):
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)
