"""What can go wrong, and the exit code it ends with.

Every error that a user can cause is an `LlmoptError`: it says *what* failed, *where*, and *what to do*. The command
line prints it without a traceback; anything else that escapes is a defect of llmopt.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from enum import IntEnum
from pathlib import Path

_LONGEST_LINE = 2000
"""Characters of a line that is shown whole; a name out of somebody's file may have any number."""

_DISK_FULL = ("no space left on device", "os error 28", "disk quota exceeded")


class ExitCode(IntEnum):
    """The exit status of every command; stable, so that makefiles and pipelines can rely on it."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    UNMET = 3
    INTERRUPTED = 130
    TERMINATED = 143


class LlmoptError(Exception):
    """Something that was asked for could not be done.

    Args:
        what: one sentence, without a final stop, naming the thing that failed.
        where: the file, layer, pass or value at fault, and the figures that show it; one or several lines.
        hint: an action that the user can take.
    """

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = _shown(what)
        self.where = None if where is None else _shown(where)
        self.hint = None if hint is None else _shown(hint)
        super().__init__(self.what)

    def __str__(self) -> str:
        """Render as the terminal shows it, without colour."""
        lines = [f"error: {self.what}"]
        if self.where:
            lines += [f"  {line}" for line in self.where.splitlines()]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """Render for `--json`."""
        return {"error": self.what, "where": self.where, "hint": self.hint, "exit_code": int(self.exit_code)}


def _shown(text: str) -> str:
    """Return a text with the middle of each line that is too long left out."""
    half = _LONGEST_LINE // 2
    lines = (f"{line[:half]}…{line[-half:]}" if len(line) > _LONGEST_LINE else line for line in text.split("\n"))
    return "\n".join(lines)


class UsageError(LlmoptError):
    """Bad usage or a bad recipe: refused before any work was done (exit 2)."""

    exit_code = ExitCode.USAGE


class UnmetError(LlmoptError):
    """A verification or a gate was not met (exit 3).

    Args:
        what: see `LlmoptError`.
        where: see `LlmoptError`.
        hint: see `LlmoptError`.
        artifact: where the artifact stands aside, with its manifest and the record of the run.
        unmet: each gate that was not met, and what was measured for it.
    """

    exit_code = ExitCode.UNMET

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        artifact: Path | None = None,
        unmet: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.artifact = artifact
        self.unmet = tuple(unmet)

    def to_dict(self) -> dict[str, object]:
        """Render for `--json`: also where the artifact stands, and what was not met."""
        document = super().to_dict()
        if self.artifact is not None:
            document["artifact"] = str(self.artifact)
            document["unmet"] = [{"gate": gate, "measured": measured} for gate, measured in self.unmet]
        return document


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint for a misspelt `name`: the closest of the `known` names, or all of them."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else f"known: {', '.join(names)}"


def is_disk_full(error: BaseException) -> bool:
    """Return whether the system, or a library in its own words, says that a disk or a quota is full."""
    if getattr(error, "errno", None) in {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}:
        return True
    return any(phrase in str(error).lower() for phrase in _DISK_FULL)
