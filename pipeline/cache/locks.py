"""Locks on files, which the system releases when their process ends, however it ends."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

_PAUSE = 0.1
"""Seconds between two looks at a lock that another process holds."""


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Who took a lock, for the one who finds it taken.

    Attributes:
        pid: number of the process.
        host: the machine it runs on.
        started: when it took the lock, as its clock had it; shown, and never compared.
        command: its command line.
    """

    pid: int
    host: str
    started: str
    command: str

    def __str__(self) -> str:
        """Render as `process 4711 on laptop, since 2026-01-31 09:30:00 (llmopt run recipe.yaml)`."""
        return f"process {self.pid} on {self.host}, since {self.started} ({self.command})"


def this_process() -> Holder:
    """Return what this process writes into the locks that it takes."""
    command = shlex.join(["llmopt", *sys.argv[1:]])
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    return Holder(pid=os.getpid(), host=platform.node(), started=started, command=command[:200])


class Lock:
    """A lock on a file: one process has it alone, or several share it.

    Locks of `flock` belong to an open file, so nothing is left of one whose process was killed but a file that nobody
    holds. Where the system or its disk has no such locks, `take` raises `OSError`.

    Args:
        path: the file; made where it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def take(self, *, shared: bool = False) -> bool:
        """Take the lock if it is free; return whether it was.

        Raises:
            OSError: the file cannot be made, or its disk knows no locks.
        """
        if fcntl is None:
            raise OSError("this system has no flock")
        self.release()
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                return False
            except BaseException:
                os.close(file)
                raise
            if _is(file, self.path):
                break
            os.close(file)  # its holder has removed it meanwhile
        self._file = file
        if not shared:
            os.ftruncate(file, 0)
            with suppress(OSError):  # a full disk: the lock holds all the same
                os.pwrite(file, msgspec.json.encode(this_process()), 0)
        return True

    def wait(self, tell: Callable[[str], None], *, shared: bool = False) -> None:
        """Take the lock as soon as it is free, and tell once who holds it meanwhile."""
        looks = 0
        while not self.take(shared=shared):
            looks += 1
            if looks == 2:  # who only looks whether it is free holds it for less
                tell(self.holder())
            time.sleep(_PAUSE)

    def share(self) -> None:
        """Let others share a lock that this process has alone; between the two another may have had it."""
        assert fcntl is not None, "the lock is held"
        assert self._file is not None, "the lock is held"
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def release(self, *, remove: bool = False) -> None:
        """Give the lock back, and remove its file where this process had it alone."""
        if self._file is None:
            return
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None

    def holder(self) -> str:
        """Return in words who took the lock last."""
        try:
            return str(msgspec.json.decode(self.path.read_bytes(), type=Holder))
        except (OSError, msgspec.DecodeError, msgspec.ValidationError):
            return "another process"


def lock_file(file: int) -> None:
    """Wait until this process alone has an open file or folder; closing it gives it back.

    Raises:
        OSError: its disk knows no locks.
    """
    if fcntl is None:
        raise OSError("this system has no flock")
    fcntl.flock(file, fcntl.LOCK_EX)


def _is(file: int, path: Path) -> bool:
    """Return whether an open file still is the one at `path`."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False
