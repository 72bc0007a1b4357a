"""The blocks that a sweep has finished, written down one by one, so that a run that was killed goes on behind them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ...core.activations import QuantizedCache, QuantizedInput
from ...core.errors import is_disk_full
from ...core.manifest import FileRecord
from ...core.passes import PassResult
from ...models.states import StateFile
from ...models.store import StoredFile
from ..background import in_background
from ..output import file_record
from .sealed import DamagedError, read_sealed, write_sealed
from .store import check_file

ENDING = ".block"
"""Of the file that tells of a finished block."""


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """What a sweep made of one block.

    Attributes:
        block: its name.
        seconds: what it took.
        file: what was written of it, its path below the folder; None when nothing was.
        record: size and hash of that file.
        results: what each pass did to the block.
        inputs: layers whose inputs are rounded now.
        caches: attention modules whose keys and values are.
        sparse: layers whose zeros stay.
        tokens: how many calibration tokens each expert saw.
        findings: what a survey had found up to here.
        states: what the block returned on the calibration samples, and earlier stacks' last blocks.
    """

    block: str
    seconds: float
    file: StoredFile | None
    record: FileRecord | None
    results: list[PassResult]
    inputs: dict[str, QuantizedInput]
    caches: dict[str, QuantizedCache]
    sparse: list[str]
    tokens: list[int]
    findings: Any
    states: list[StateFile]


class BlocksDone:
    """The finished blocks of one sweep, each a file beside what was made of it.

    Args:
        folder: where.

    Attributes:
        finished: those of an earlier run, in order; of each the files were found as they were written.
        stopped: whether no more are written down, since the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.finished = _read(folder)
        self._count = len(self.finished)
        self.stopped = False
        self._settle: Callable[[], None] = _nothing

    def add(self, finished: Finished) -> None:
        """Write down a block, beside the work on the next one; its file need not be hashed yet."""
        self.settle()
        if self.stopped:
            return
        self._count += 1
        path = self.folder / f"{self._count:06d}{ENDING}"

        def write() -> None:
            record = None if finished.file is None else file_record(self.folder / finished.file.path)
            write_sealed(path, msgspec.structs.replace(finished, record=record))

        self._settle = in_background(write)

    def settle(self) -> None:
        """Wait until the last block is written down: only then may the states before its own be written over."""
        settle, self._settle = self._settle, _nothing
        try:
            settle()
        except OSError as error:
            if not is_disk_full(error):
                raise
            self.stopped = True

    def records(self) -> Mapping[str, FileRecord]:
        """Return size and hash of the files of all blocks by their path, as they are written down."""
        self.settle()
        return {one.file.path: one.record for one in _whole(self.folder) if one.file is not None and one.record}

    def names(self) -> set[str]:
        """Return the names of all files that the finished blocks need."""
        names = {f"{index + 1:06d}{ENDING}" for index in range(len(self.finished))}
        names |= {one.file.path for one in self.finished if one.file is not None}
        return names | {state.name for one in self.finished[-1:] for state in one.states}

    def seconds(self) -> float:
        """Return what the blocks of the earlier run took."""
        return sum((one.seconds for one in self.finished), 0.0)


def _nothing() -> None:
    pass


def _whole(folder: Path) -> list[Finished]:
    """Return the blocks that are written down, up to the first that is not."""
    found: list[Finished] = []
    while True:
        try:
            found.append(read_sealed(folder / f"{len(found) + 1:06d}{ENDING}", Finished))
        except DamagedError:
            return found


def _read(folder: Path) -> list[Finished]:
    """Return the blocks behind which a run can go on: their files are intact, and so is what the last one returned."""
    found: list[Finished] = []
    for one in _whole(folder):
        try:
            if one.file is not None and one.record is not None:
                check_file(folder / one.file.path, one.record)
        except DamagedError:
            break
        found.append(one)
    while found and not all(_intact(folder, state) for state in found[-1].states):
        found.pop()
    return found


def _intact(folder: Path, state: StateFile) -> bool:
    try:
        return zlib.crc32((folder / state.name).read_bytes()) == state.crc32
    except OSError:
        return False
