"""Files that must stay as they are while a run reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from ..core.errors import LlmoptError
from .background import in_background

_Look = tuple[int, int, int] | None


class Watched:
    """Files as they are now, and their hash, which is computed beside the work.

    Args:
        files: what is read.
        sha256: hashes them.
    """

    def __init__(self, files: Iterable[Path], sha256: Callable[[], str]) -> None:
        self._before = {file: _look(file) for file in files}
        self._sha256 = sha256
        self._hashed = in_background(lambda: (sha256(), self.changed()))

    def sha256(self) -> str:
        """Return the hash, once it is known."""
        return self._hashed()[0]

    def check(self) -> None:
        """Make sure that what was read is what was hashed: a file that looks different must have the same bytes.

        Raises:
            LlmoptError: it has others, or it changed before its hash was known.
        """
        changed = self.changed()
        if not changed:
            return
        digest, changed_before = self._hashed()
        if not changed_before and all(file.is_file() for file in changed) and self._sha256() == digest:
            return
        raise LlmoptError(
            f"`{changed[0]}` was changed while it was read",
            where=f"{len(changed)} of {len(self._before)} files have another size, time or place on the disk than when "
            "the run began",
            hint="nothing was written: run it again once nobody writes there",
        )

    def changed(self) -> list[Path]:
        """Return the files that look different now."""
        return [file for file, before in self._before.items() if _look(file) != before]


def _look(file: Path) -> _Look:
    """Return size, time of the last change and place on the disk; None where there is no such file."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
