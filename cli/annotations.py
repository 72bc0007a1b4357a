"""Errors as GitHub Actions shows them beside a run: workflow commands on stderr, which the runner reads as well.

https://docs.github.com/actions/reference/workflow-commands-for-github-actions
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..core.errors import LlmoptError


def wanted() -> bool:
    """Return whether the command runs in GitHub Actions."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def annotate(error: LlmoptError) -> None:
    """Write an error as annotations: one for each gate that was not met, or one for the error itself."""
    if not wanted():
        return
    from ..core.errors import UnmetError

    unmet = error.unmet if isinstance(error, UnmetError) else ()
    for line in [command("error", title, text) for title, text in unmet] or [_whole(error)]:
        print(line, file=sys.stderr, flush=True)


def _whole(error: LlmoptError) -> str:
    return command("error", error.what, "\n".join(part for part in (error.where, error.hint) if part) or error.what)


def command(kind: str, title: str, text: str) -> str:
    """Return a workflow command in one line."""
    return f"::{kind} title={_escaped(title).replace(':', '%3A').replace(',', '%2C')}::{_escaped(text)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
