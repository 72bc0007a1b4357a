"""Graphs on their way through the passes, kept where making them took much longer than writing them down will."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ...core.exports import GraphExporter
from ...core.numbers import seconds
from ...core.passes import PassResult
from ...graphs.stored import read_graph, weight_bytes, write_graph
from ..output import file_record
from ..steps import AnyPass
from .held import Held
from .keys import Keys
from .sealed import unpack
from .store import Entry, Index

if TYPE_CHECKING:
    import onnx_ir as ir

SHARE = 0.05
"""Of the time that was spent since the last graph that was kept, writing the next one may take so much."""

_BYTES_PER_SECOND = 500e6
"""How fast a disk takes a graph, until it is known better."""


@dataclass(slots=True)
class Lowered:
    """A graph on its way.

    Attributes:
        graph: it.
        results: what the passes up to here did.
        rounded: `GraphModel.rounded`.
        notes: of the codes that were put into it, None before they are.
        seconds_saved: what it took to make it as it was taken from the store.
        cached: whether it was taken from there as it is, nothing being done since.
    """

    graph: ir.Model
    results: list[PassResult] = field(default_factory=list[PassResult])
    rounded: set[str] = field(default_factory=set[str])
    notes: list[str] | None = None
    seconds_saved: float = 0.0
    cached: bool = False


class _Content(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a graph beside its file."""

    results: list[PassResult]
    rounded: list[str]
    notes: list[str] | None


class KeptGraphs:
    """The graph of one export, as it is traced and after each pass on it.

    Args:
        held: where graphs are kept.
        keys: of the recipe, its torch passes behind it.
        exporter: the format.
        passes: those on the graph.
    """

    def __init__(self, held: Held, keys: Keys, exporter: GraphExporter[Any], passes: Sequence[AnyPass]) -> None:
        self._held = held
        self._keys = None if held.store is None else keys.graphs(exporter, passes)
        self._names = [exporter.name, *(one.name for one in passes)]
        self._begun, self._before, self._pace = time.monotonic(), 0.0, 1 / _BYTES_PER_SECOND

    def latest(self) -> Lowered | None:
        """Return the graph that is kept with the most passes done, None where there is none."""
        for done in range(len(self._names) - 1, -1, -1):
            entry = None if self._keys is None else self._held.find(self._keys[done], self._title(done))
            if entry is not None and entry.index is not None:
                self._before = entry.index.seconds
                self._held.reporter.note(f"{self._title(done)}: from the cache, {seconds(self._before)} saved")
                content = unpack(entry.index.content, _Content)
                graph, rounded = read_graph(entry.folder), set(content.rounded)
                self._begun = time.monotonic()
                return Lowered(graph, content.results, rounded, content.notes, self._before, cached=True)
        return None

    def offer(self, lowered: Lowered) -> None:
        """Keep a graph as it is now, if that is worth it."""
        took = time.monotonic() - self._begun
        count = max(1, weight_bytes(lowered.graph))
        if self._keys is None or self._pace * count > SHARE * took or count > self._held.limit:
            return
        done = len(lowered.results)
        entry = self._held.begin(self._keys[done])
        if entry is None:
            return
        self._held.making(entry)
        begun = time.monotonic()
        try:
            write_graph(lowered.graph, entry.folder)
        except OSError as error:
            self._held.give_up(entry, error)
            self._keys = None
            return
        self._before += took
        content = _Content(results=lowered.results, rounded=sorted(lowered.rounded), notes=lowered.notes)
        self._held.finish(self._title(done), self._before, content, lambda index: _finish(entry, index))
        self._begun = time.monotonic()
        self._pace = max(self._pace, (self._begun - begun) / count)

    def _title(self, done: int) -> str:
        return " + ".join([f"{self._names[0]} graph", *self._names[1 : done + 1]])


def _finish(entry: Entry, index: Index) -> None:
    files: dict[str, Path] = {path.name: path for path in entry.folder.iterdir()}
    records = {name: file_record(path) for name, path in sorted(files.items())}
    entry.finish(msgspec.structs.replace(index, files=records))
