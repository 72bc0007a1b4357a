"""The entries of the store that one run makes or uses: nobody else removes them before it ends."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from ...core.errors import is_disk_full
from ...core.progress import Reporter
from ..background import in_background
from .sealed import pack
from .store import FORMAT, Entry, Index, Store


class Held:
    """Takes entries from the store, has them finished beside the work, and gives all of them back at the end.

    Args:
        store: where results are kept; None keeps nothing.
        model: what the recipe named, for those who look at the store.
        reporter: is told what was taken from the store.
        spoiled: tells whether what the keys stand for has changed meanwhile; then nothing of this run is kept.

    Attributes:
        store: None from when the store cannot be used any more, too.
        limit: bytes that the entries may take.
    """

    def __init__(
        self, store: Store | None, model: str, reporter: Reporter, *, spoiled: Callable[[], bool] = lambda: False
    ) -> None:
        self.store, self.model, self.reporter = store, model, reporter
        self.limit = 0 if store is None else store.limit()
        self._spoiled = spoiled
        self._entries: list[Entry] = []
        self._built: list[Entry] = []
        self._unfinished: list[Entry] = []
        self._finishing: list[Callable[[], None]] = []

    def take(self, key: str, title: str) -> Entry | None:
        """Return a step's entry, whole or to be made, once no other run makes it; None where the store cannot be used.

        Args:
            key: of what is made.
            title: its passes, for people.
        """
        return self._have(lambda store: store.take(key, title, self.reporter))

    def find(self, key: str, title: str) -> Entry | None:
        """Return an entry that is whole, None where there is none now."""
        return self._have(lambda store: store.find(key, title, self.reporter))

    def begin(self, key: str) -> Entry | None:
        """Return an empty entry to make, None where another run has it."""
        return self._have(lambda store: store.begin(key))

    def making(self, entry: Entry) -> None:
        """Note that this run makes an entry: it goes where the run turns out to be spoiled."""
        self._built.append(entry)

    def finish(self, title: str, seconds: float, content: object, work: Callable[[Index], None]) -> None:
        """Have an entry finished beside the work.

        Args:
            title: its passes, for people.
            seconds: what it took to make it.
            content: what is to be known of it beside its files.
            work: hashes the files, adds them to the index, and finishes the entry.
        """
        index = Index(format=FORMAT, title=title, model=self.model, seconds=seconds, files={}, content=pack(content))
        self._finishing.append(in_background(lambda: work(index)))

    def give_up(self, entry: Entry, error: Exception | None) -> None:
        """Go on without the store, whose disk is full; what lies there already is used until the end of the run."""
        self._entries.remove(entry)
        self._built.remove(entry)
        self._unfinished.append(entry)
        self.without(error)

    def without(self, error: Exception | None) -> None:
        """Go on without the store, and say why; None for a full disk."""
        why = "its disk is full" if error is None or is_disk_full(error) else str(error)
        assert self.store is not None, "an entry is of a store"
        self.reporter.warn(f"going on without the cache at {self.store.folder}: {why}")
        self.store = None

    def close(self, *, wait: bool = True) -> None:
        """Give the entries back, once what was made is written down."""
        try:
            for finish in self._finishing if wait else ():
                self._carefully(finish)
        finally:
            spoiled = self._built if self._built and self._spoiled() else []
            for entry in self._entries:
                if entry not in spoiled:
                    entry.close()
            for entry in [*self._unfinished, *spoiled]:
                entry.remove()
        if wait and self.store is not None and self._entries:
            self.store.prune(self.store.limit())

    def _have(self, get: Callable[[Store], Entry | None]) -> Entry | None:
        if self.store is None:
            return None
        try:
            entry = get(self.store)
        except OSError as error:
            self.without(error)
            return None
        if entry is not None:
            self._entries.append(entry)
        return entry

    def _carefully(self, finish: Callable[[], None]) -> None:
        try:
            finish()
        except OSError as error:
            self.reporter.warn(f"not kept in the cache: {error}")


@contextmanager
def holding(held: Held) -> Generator[Held]:
    """Have the entries of a run, and give everything back behind them, without delay where a signal ends the run."""
    try:
        yield held
    except Exception:
        held.close()
        raise
    except BaseException:
        held.close(wait=False)
        raise
    else:
        held.close()
