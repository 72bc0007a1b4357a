"""The steps of a run, and what is kept of them: each is taken from the store, gone on with, or made and put there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from ...core.errors import is_disk_full
from ...core.manifest import FileRecord
from ...core.numbers import seconds, size
from ...core.passes import BlockPass, PassResult
from ...models.handle import TorchModel
from ...models.saved import SavedModel, restore, save
from ..output import file_record
from ..steps import AnyPass
from .blocks_done import ENDING, BlocksDone
from .held import Held
from .keys import Keys
from .sealed import unpack
from .store import Entry, Index

CHECKPOINTS = "checkpoints"
"""The folder in an entry where a pass that learns leaves its checkpoints."""

_LEARNING = 20
"""Bytes that the checkpoints of a weight that learns take: itself, two moments, the best so far, and room."""

Work = Callable[[TorchModel, BlocksDone | None, Path | None], tuple[TorchModel, list[PassResult]]]
"""A step: from the model, the blocks that are finished and a folder for checkpoints, to the model it makes and what its
passes did."""


@dataclass(frozen=True, slots=True)
class Made:
    """A step that is done.

    Attributes:
        model: the model as it left it.
        results: what each of its passes did.
        cached: whether an earlier run did it.
        blocks_resumed: how many blocks of it an earlier run had finished.
        seconds_saved: what these parts took then.
    """

    model: TorchModel
    results: list[PassResult]
    cached: bool = False
    blocks_resumed: int = 0
    seconds_saved: float = 0.0


class _Content(msgspec.Struct, frozen=True, kw_only=True):
    """What a step left, beside its files."""

    results: list[PassResult]
    model: SavedModel


class KeptSteps:
    """Runs the steps of a recipe in their order.

    Args:
        held: where results are kept; without a store they are kept for this run alone.
        keys: of the steps.
        scratch: a folder that vanishes with the run.
    """

    def __init__(self, held: Held, keys: Keys, scratch: Path) -> None:
        self._held, self._keys, self._scratch, self._reporter = held, keys, scratch, held.reporter
        self._steps = 0

    def make(self, group: Sequence[AnyPass], later: Sequence[AnyPass], model: TorchModel, work: Work) -> Made:
        """Return what a step makes of the model.

        Args:
            group: its passes.
            later: those behind it.
            model: the model as the step before left it.
            work: does it.
        """
        self._steps += 1
        title = " + ".join(one.name for one in group)
        entry = self._entry(group, later, title, model)
        if entry is None:
            return Made(*work(self._at(model, self._scratch / f"step-{self._steps}"), None, None))
        if entry.index is not None:
            made = _restored(entry, entry.index, model)
            self._reporter.note(f"{title}: from the cache, {seconds(made.seconds_saved)} saved")
            return made
        return self._build(entry, title, group, model, work)

    def _entry(self, group: Sequence[AnyPass], later: Sequence[AnyPass], title: str, model: TorchModel) -> Entry | None:
        """Return the step's entry, None where it is not to be kept."""
        if self._held.store is None:
            return None
        key = self._keys.next(group, later)
        if key is None:
            self._reporter.note(f"{title}: not kept in the cache, for it reads a data set of the hub, which may change")
            self._held.store = None
            return None
        expected = _expected_bytes(group, model)
        if expected > self._held.limit:
            self._reporter.note(
                f"{title}: not kept in the cache, for its {size(expected)} are more than the {size(self._held.limit)} "
                "that all may take (LLMOPT_CACHE_SIZE)"
            )
            return None
        return self._held.take(key, title)

    def _build(self, entry: Entry, title: str, group: Sequence[AnyPass], model: TorchModel, work: Work) -> Made:
        spare = self._scratch / f"step-{self._steps}"
        done = BlocksDone(entry.folder) if isinstance(group[0], BlockPass) else None
        resumed, saved = (0, 0.0) if done is None else (len(done.finished), done.seconds())
        if resumed:
            blocks = "1 finished block" if resumed == 1 else f"{resumed} finished blocks"
            self._reporter.note(f"{title}: going on after {blocks}, {seconds(saved)} saved")
        self._held.making(entry)
        begun = time.monotonic()
        try:
            entry.clear({CHECKPOINTS} if done is None else done.names())
            before = self._at(model, entry.folder)
            before.store.spare = spare
            learns = _LEARNING * model.facts.parameters <= self._held.limit
            after, results = work(before, done, entry.folder / CHECKPOINTS if learns else None)
        except Exception as error:
            if not is_disk_full(error):
                raise
            self._held.give_up(entry, error)
            return Made(*work(self._at(model, spare), None, None))
        if before.store.folder != entry.folder or (done is not None and done.stopped):
            self._held.give_up(entry, None)
        else:
            took = time.monotonic() - begun + saved
            content = _Content(results=results, model=save(before, after, entry.folder))
            self._held.finish(title, took, content, lambda index: _finish(entry, index, content.model, done))
        return Made(after, results, blocks_resumed=resumed, seconds_saved=saved)

    def _at(self, model: TorchModel, folder: Path) -> TorchModel:
        """Return the model with a store that writes to a folder of its own."""
        return replace(model, store=model.store.at(folder))


def _finish(entry: Entry, index: Index, model: SavedModel, done: BlocksDone | None) -> None:
    """Remove what nobody needs any more, hash the rest, and make the entry whole."""
    known: Mapping[str, FileRecord] = {} if done is None else done.records()
    needed = {path.relative_to(entry.folder).as_posix(): path for path in model.paths(entry.folder)}
    for path in list(entry.folder.rglob("*")):
        name = path.relative_to(entry.folder).as_posix()
        if path.is_file() and name not in needed and not name.endswith(ENDING):
            path.unlink(missing_ok=True)
    files = {name: known.get(name) or file_record(path) for name, path in needed.items()}
    entry.finish(msgspec.structs.replace(index, files=files))
    for path in entry.folder.glob(f"*{ENDING}"):
        path.unlink(missing_ok=True)


def _restored(entry: Entry, index: Index, model: TorchModel) -> Made:
    content = unpack(index.content, _Content)
    made = restore(model, content.model, entry.folder)
    return Made(made, content.results, cached=True, seconds_saved=index.seconds)


def _expected_bytes(group: Sequence[AnyPass], model: TorchModel) -> int:
    """Return about what a step will write: a byte for each weight that it rounds, else the weights as they are."""
    if all(one.grid() is not None or one.input_grid() is not None for one in group):
        return model.facts.parameters * 9 // 8
    return model.facts.bytes
