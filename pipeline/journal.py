"""A file of results that grows window by window and appears whole; a run that was killed goes on where it was.

OUT.partial         the lines of the finished windows
OUT.partial.json    what they were made from, how many bytes of OUT.partial count, and the figures so far
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from ..core.errors import UsageError

ENDINGS = (".partial", ".partial.json")
"""What is added to the name of the output for the files beside it."""

_ANOTHER = "give another file with -o"


class Totals(msgspec.Struct, kw_only=True):
    """Figures of all finished windows.

    Attributes:
        rows: texts read, or sounds heard.
        empty: texts without tokens.
        truncated: texts that were longer than what is kept.
        tokens: tokens of the texts without padding, or tokens written.
        padded: with padding.
        batches: batches computed.
        sound_seconds: how long the sounds are.
        bytes: length of the file.
    """

    rows: int = 0
    empty: int = 0
    truncated: int = 0
    tokens: int = 0
    padded: int = 0
    batches: int = 0
    sound_seconds: float = 0.0
    bytes: int = 0


class _State(msgspec.Struct):
    key: str
    totals: Totals


class Journal:
    """The growing file.

    Args:
        output: the file that will appear.
        key: tells what the results are made from; asked for when it is needed.
    """

    def __init__(self, output: Path, key: Callable[[], str]) -> None:
        self._output = output
        self._partial, self._state = (output.with_name(f"{output.name}{ending}") for ending in ENDINGS)
        self._key = key
        self.totals = Totals()

    def resume(self) -> bool:
        """Take up what an earlier run has finished, if it was made from the same; otherwise begin anew.

        Returns:
            Whether an earlier run was given up because it was made from something else.
        """
        if not self._state.is_file() or not self._partial.is_file():
            self._discard()
            return False
        try:
            state = msgspec.json.decode(self._state.read_bytes(), type=_State)
        except msgspec.DecodeError:
            state = None
        if state is None or state.key != self._key() or self._partial.stat().st_size < state.totals.bytes:
            self._discard()
            return True
        os.truncate(self._partial, state.totals.bytes)  # what lies behind belongs to a window that was cut off
        self.totals = state.totals
        return False

    def append(self, lines: Iterable[bytes], totals: Totals) -> None:
        """Add the lines of a window, with the figures up to its end."""
        with self._partial.open("ab") as stream:
            for line in lines:
                stream.write(line + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
            totals.bytes = stream.tell()
        fresh = self._state.with_name(f"{self._state.name}.new")
        with fresh.open("wb") as stream:
            stream.write(msgspec.json.encode(_State(self._key(), totals)))
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(self._state)
        self.totals = totals

    def finish(self) -> None:
        """Put the file in place."""
        self._partial.replace(self._output)
        self._state.unlink(missing_ok=True)

    def _discard(self) -> None:
        for path in (self._partial, self._state):
            path.unlink(missing_ok=True)


def check_file(output: Path, *, force: bool, sources: Iterable[Path]) -> None:
    """Refuse a file that must not or cannot be written.

    Args:
        output: the file.
        force: whether it may be replaced.
        sources: what is read; looked at only where the file exists.

    Raises:
        UsageError: it exists and `force` is not set, is a folder or is read, or its folder cannot be written to.
    """
    if output.is_dir():
        raise UsageError(f"`{output}` is a folder", where="results are written to one file", hint=_ANOTHER)
    if output.exists():
        if any(output.samefile(source) for source in sources if source.exists()):
            raise UsageError(f"`{output}` is the input", hint=_ANOTHER)
        if not force:
            raise UsageError(f"`{output}` exists already", hint="replace it with --force, or give another file with -o")
    folder = output.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"cannot write `{output}`", where=f"there is no folder {folder}", hint=_ANOTHER)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write `{output}`", where=f"{folder} may not be written to", hint=_ANOTHER)


def key_of(parts: dict[str, Any]) -> str:
    """Return a hash over plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
