"""What passes have made, kept for later runs: a folder of entries, each found by the hash of all it depends on.

    entries/KEY/        what a step wrote; it is whole once INDEX is there, and is read where it lies
    locks/KEY.lock      held alone by the run that makes the entry, shared by those that use it
    uses                which entry was used last, by a counter: clocks go backwards
    lock                held for moments by whoever removes entries

Failures are not kept: an entry without its index is only what a killed run had finished of it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ...core.digests import file_sha256
from ...core.manifest import FileRecord
from ...core.progress import Reporter, Silent
from .locks import Lock
from .sealed import DamagedError, read_sealed, write_sealed

FORMAT = 1
"""Of what an entry holds. One of another format is removed when it is found, and made anew."""

INDEX = "index"
_GONE = ".gone-"


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """What an entry is.

    Attributes:
        format: `FORMAT` of the version that made it.
        title: the pass, or the passes of a sweep joined by " + ".
        model: the model that the recipe named, for people.
        seconds: what it took to make it.
        files: its files by their path in its folder.
        content: what the step left beside its files, packed.
    """

    format: int
    title: str
    model: str
    seconds: float
    files: dict[str, FileRecord]
    content: bytes


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """Where results are kept.

    Attributes:
        folder: the store's.
        limit: bytes that it may take; None as for `Store`.
    """

    folder: Path
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """An entry, for those who look at the store.

    Attributes:
        key: its name.
        title: the pass or passes, None when it was never finished.
        model: the model that the recipe named.
        seconds: what it took to make it.
        bytes: of its files.
        used: whether a run uses it just now.
    """

    key: str
    title: str | None
    model: str
    seconds: float
    bytes: int
    used: bool


class Entry:
    """An entry that this run makes or uses; nobody removes it before `close`.

    Attributes:
        key: its name.
        folder: where its files lie.
        lock: held alone while it is made, then shared.
        index: what it is, None while it is not whole.
    """

    def __init__(self, store: Store, key: str, lock: Lock) -> None:
        self._store, self.lock = store, lock
        self.key, self.folder = key, store.entries / key
        self.index: Index | None = None

    def finish(self, index: Index) -> None:
        """Make the entry whole: from now on others can use it."""
        write_sealed(self.folder / INDEX, index)
        self.index = index
        with self._store.tidying():
            self.lock.share()

    def clear(self, keep: Collection[str]) -> None:
        """Remove what a killed run has left in it, but for files and folders of some names."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.name in keep:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def close(self) -> None:
        """Let others remove it."""
        self.lock.release()

    def remove(self) -> None:
        """Remove it, for it cannot be finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.release(remove=True)


class Store:
    """The folder.

    Args:
        folder: where it is; made where it is not there.
        limit: bytes that all entries may take together once a run has ended; None for 20 GiB, or half of what they
            and the free space of the disk are together where that is less.

    Raises:
        OSError: the folder cannot be written to, or its disk knows no locks.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder, self._limit = folder, limit
        self.entries, self._locks = folder / "entries", folder / "locks"
        for one in (self.entries, self._locks):
            one.mkdir(parents=True, exist_ok=True)
        tag = folder / "CACHEDIR.TAG"
        if not tag.exists():
            # Backups leave a folder out that holds this file (bford.info/cachedir).
            tag.write_text("Signature: 8a477f597d28d172789f06886806bc55\n# The cache of llmopt.\n", encoding="utf-8")
        with self.tidying():
            pass

    def take(self, key: str, title: str, reporter: Reporter) -> Entry:
        """Return the entry of a key: whole and intact, or empty or begun, to be made by this run alone.

        Waits while another run makes it.
        """

        def tell(holder: str) -> None:
            reporter.note(f"{title}: waiting for {holder}, which makes the same")

        entry = Entry(self, key, Lock(self._locks / f"{key}.lock"))
        while True:
            entry.lock.wait(tell, shared=True)
            if self._open(entry, title, reporter):
                break
            entry.lock.wait(tell)
            # Another run may have made it between the two; then it is shared with that one.
            if not self._open(entry, title, Silent()):
                self._drop_index(entry)
                break
        self._use(key)
        return entry

    def find(self, key: str, title: str, reporter: Reporter) -> Entry | None:
        """Return an entry that is whole and intact, without waiting; None where there is none, or a run makes it."""
        entry = Entry(self, key, Lock(self._locks / f"{key}.lock"))
        if not (entry.folder / INDEX).exists() or not entry.lock.take(shared=True):
            return None
        if not self._open(entry, title, reporter):
            entry.close()
            self._remove(entry.folder)
            return None
        self._use(key)
        return entry

    def begin(self, key: str) -> Entry | None:
        """Return an empty entry for this run alone to make, without waiting; None where another run has or made it."""
        entry = Entry(self, key, Lock(self._locks / f"{key}.lock"))
        if not entry.lock.take():
            return None
        if (entry.folder / INDEX).exists():
            entry.close()
            return None
        entry.clear(())
        self._use(key)
        return entry

    def size(self) -> int:
        """Return the bytes of all entries."""
        return sum(_size(folder) for folder in self._folders())

    def limit(self) -> int:
        """Return the bytes that the entries may take."""
        if self._limit is not None:
            return self._limit
        return min(20 << 30, (shutil.disk_usage(self.folder).free + self.size()) // 2)

    def shown(self) -> list[Shown]:
        """Return all entries, the one that was used last first."""
        uses = self._uses()
        found: list[Shown] = []
        for folder in sorted(self._folders(), key=lambda one: (-uses.get(one.name, 0), one.name)):
            try:
                index = read_sealed(folder / INDEX, Index)
            except DamagedError:
                index = None
            title, model, seconds = (None, "", 0.0) if index is None else (index.title, index.model, index.seconds)
            found.append(Shown(folder.name, title, model, seconds, _size(folder), self._in_use(folder.name)))
        return found

    def prune(self, limit: int) -> tuple[int, int]:
        """Remove entries, the one first that was not used for the longest, until the others fit.

        Args:
            limit: bytes that may stay, less than 0 for no entry at all. Those that a run uses stay.

        Returns:
            How many were removed, and their bytes.
        """
        with self.tidying():
            for left in self.entries.glob(f"{_GONE}*"):
                shutil.rmtree(left, ignore_errors=True)
            uses = self._uses()
            sizes = {folder: _size(folder) for folder in self._folders()}
            total, count, freed = sum(sizes.values()), 0, 0
            for folder in sorted(sizes, key=lambda one: (uses.get(one.name, 0), one.name)):
                if total - freed <= limit:
                    break
                if self._remove(folder):
                    count, freed = count + 1, freed + sizes[folder]
            known = {folder.name for folder in self._folders()}
            self._write_uses({key: number for key, number in uses.items() if key in known})
        return count, freed

    @contextmanager
    def tidying(self) -> Generator[None]:
        """Keep others from removing entries for a moment."""
        lock = Lock(self.folder / "lock")
        lock.wait(lambda _: None)
        try:
            yield
        finally:
            lock.release()

    def _open(self, entry: Entry, title: str, reporter: Reporter) -> bool:
        """Read the index and check the files; an entry that is not as it was written counts as not there."""
        if not (entry.folder / INDEX).exists():
            return False
        try:
            index = read_sealed(entry.folder / INDEX, Index)
            _check_format(index)
            for name, record in index.files.items():
                check_file(entry.folder / name, record)
        except DamagedError as error:
            reporter.note(f"{title}: what the cache holds is not used ({error}); it is made anew")
            return False
        entry.index = index
        return True

    def _drop_index(self, entry: Entry) -> None:
        """Begin anew in the place of an entry that was whole and is not intact; one that was begun stays."""
        if (entry.folder / INDEX).exists():
            shutil.rmtree(entry.folder, ignore_errors=True)
        entry.folder.mkdir(parents=True, exist_ok=True)

    def _folders(self) -> list[Path]:
        return [one for one in self.entries.iterdir() if one.is_dir() and not one.name.startswith(_GONE)]

    def _in_use(self, key: str) -> bool:
        lock = Lock(self._locks / f"{key}.lock")
        free = lock.take()
        lock.release(remove=False)
        return not free

    def _remove(self, folder: Path) -> bool:
        """Remove an entry that no run uses; return whether it is gone."""
        lock = Lock(self._locks / f"{folder.name}.lock")
        if not lock.take():
            return False
        gone = Path(tempfile.mkdtemp(prefix=_GONE, dir=self.entries))
        folder.rename(gone / folder.name)  # so that nobody ever finds a part of it
        shutil.rmtree(gone, ignore_errors=True)
        lock.release(remove=True)
        return True

    def _uses(self) -> dict[str, int]:
        try:
            return read_sealed(self.folder / "uses", dict[str, int])
        except DamagedError:
            return {}

    def _write_uses(self, uses: dict[str, int]) -> None:
        write_sealed(self.folder / "uses", uses)

    def _use(self, key: str) -> None:
        with self.tidying():
            uses = self._uses()
            self._write_uses(uses | {key: 1 + max(uses.values(), default=0)})


def default_folder() -> Path:
    """Return where the store is when nobody says it: LLMOPT_CACHE_DIR, or llmopt in the user's folder for caches."""
    named = os.environ.get("LLMOPT_CACHE_DIR")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llmopt"


def open_store(settings: CacheSettings, reporter: Reporter) -> Store | None:
    """Return the store; None, with a warning, where it cannot be used."""
    try:
        return Store(settings.folder, settings.limit)
    except OSError as error:
        reporter.warn(f"going on without the cache at {settings.folder}: {error.strerror or error}")
        return None


def _check_format(index: Index) -> None:
    if index.format != FORMAT:
        raise DamagedError(f"it is of format {index.format}, this version writes {FORMAT}")


def check_file(path: Path, record: FileRecord) -> None:
    """Refuse a file that is not what was written.

    Raises:
        DamagedError: it says in what it differs.
    """
    try:
        if path.stat().st_size != record.bytes:
            raise DamagedError(f"{path.name} has another size than was written")
        digest = file_sha256(path)
    except OSError as error:
        raise DamagedError(f"{path.name}: {(error.strerror or 'unreadable').lower()}") from None
    if digest != record.sha256:
        raise DamagedError(f"{path.name} has another hash than was written")


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # a run at work has removed it
            continue
    return total
