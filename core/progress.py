"""How long work tells how far it is. The command line draws it; libraries and tests may stay silent."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol


class Step(Protocol):
    """One piece of long work, of a known number of units."""

    def advance(self, amount: int = 1, *, detail: str = "") -> None:
        """Say that `amount` further units are done, and what the last of them was."""
        ...


class Reporter(Protocol):
    """Receives what the user should see on stderr."""

    @contextmanager
    def step(self, title: str, total: int) -> Generator[Step]:
        """Open a piece of long work."""
        ...

    def note(self, message: str) -> None:
        """Say something once."""
        ...

    def warn(self, message: str) -> None:
        """Say something that the user should not miss."""
        ...


class _SilentStep:
    def advance(self, amount: int = 1, *, detail: str = "") -> None:
        pass


class Silent:
    """A reporter that shows nothing."""

    @contextmanager
    def step(self, title: str, total: int) -> Generator[Step]:  # noqa: ARG002
        """Open a piece of long work."""
        yield _SilentStep()

    def note(self, message: str) -> None:
        """Say something once."""

    def warn(self, message: str) -> None:
        """Say something that the user should not miss."""
