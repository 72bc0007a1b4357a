"""Names to classes, imported only when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Generic, TypeVar

from .errors import UsageError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of `name -> "module:Class"` of one kind ("pass", "export").

    Args:
        kind: what the entries are, for messages.
        package: the package that the modules are relative to.
        entries: the table.
    """

    def __init__(self, kind: str, package: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._package = package
        self._entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        """Return whether `name` is an entry."""
        return name in self._entries

    def load(self, name: str, *, where: str | None = None) -> type[T]:
        """Import and return the class called `name`.

        Raises:
            UsageError: there is none; the hint names the nearest.
        """
        if name not in self._entries:
            raise UsageError(f"unknown {self.kind} `{name}`", where=where, hint=nearest(name, self._entries))
        module, _, attribute = self._entries[name].partition(":")
        return getattr(import_module(f".{module}", self._package), attribute)
