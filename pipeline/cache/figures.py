"""Measured quality, kept by what was measured: the same artifact, data, source and versions give the same figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...core.numbers import seconds
from ...core.progress import Reporter
from ...evaluation.gates import Measured
from ..reads import Reads
from .keys import key_of
from .sealed import pack, unpack
from .store import FORMAT, Entry, Index, Store

Figures = dict[str, Measured]
"""What was measured, by metric."""


@dataclass(frozen=True, slots=True)
class KeptFigures:
    """Where figures are taken from, or put once they are measured.

    Attributes:
        store: where they are kept; None keeps none.
        reads: the files of the run; figures of files that have changed meanwhile are not kept.
        model: what the recipe named, for those who look at the store.
        reporter: is told what was taken from the store.
    """

    store: Store | None
    reads: Reads
    model: str
    reporter: Reporter

    def figures(self, title: str, depends_on: dict[str, Any], measure: Callable[[], Figures]) -> Figures:
        """Return what was measured before, or measure it.

        Args:
            title: what is measured, for people.
            depends_on: plain data that decide the figures, beside the versions of what computes.
            measure: measures.
        """
        if self.store is None:
            return measure()
        try:
            entry = self.store.take(key_of(depends_on), title, self.reporter)
        except OSError as error:
            self.reporter.warn(f"{title}: not kept in the cache: {error}")
            return measure()
        if entry.index is not None:
            entry.close()
            self.reporter.note(f"{title}: from the cache, {seconds(entry.index.seconds)} saved")
            return unpack(entry.index.content, Figures)
        begun = time.monotonic()
        try:
            found = measure()
            if not self.reads.changed():
                self._keep(entry, title, found, time.monotonic() - begun)
        finally:
            if entry.index is None:
                entry.remove()
            entry.close()
        return found

    def _keep(self, entry: Entry, title: str, found: Figures, took: float) -> None:
        index = Index(format=FORMAT, title=title, model=self.model, seconds=took, files={}, content=pack(found))
        try:
            entry.finish(index)
        except OSError as error:
            self.reporter.warn(f"{title}: not kept in the cache: {error}")
