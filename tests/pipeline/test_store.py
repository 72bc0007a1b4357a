"""The store of results: what is found again, what is not trusted, what is removed, and who may do so."""

import hashlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
from llmopt.core.manifest import FileRecord
from llmopt.core.progress import Silent
from llmopt.pipeline.cache.locks import Lock
from llmopt.pipeline.cache.sealed import DamagedError, read_sealed, write_sealed
from llmopt.pipeline.cache.store import FORMAT, INDEX, Index, Store


class Notes(Silent):
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.told = []

    def note(self, message):
        self.told.append(message)


def put(store, key, data=b"x" * 1000, *, form=FORMAT):
    """Make an entry of one file."""
    entry = store.take(key, "gptq", Silent())
    assert entry.index is None
    (entry.folder / "file").write_bytes(data)
    record = FileRecord(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    entry.finish(Index(format=form, title="gptq", model="tiny", seconds=4.0, files={"file": record}, content=b""))
    return entry


def found(store, key, reporter=None):
    entry = store.take(key, "gptq", reporter or Silent())
    entry.close()
    return entry.index is not None


def test_what_was_finished_is_found_again(tmp_path):
    store = Store(tmp_path)
    put(store, "a").close()
    assert found(Store(tmp_path), "a")
    assert not found(store, "b")
    (shown, begun) = sorted(store.shown(), key=lambda one: one.key)
    assert (shown.title, shown.model, shown.seconds, shown.used) == ("gptq", "tiny", 4.0, False)
    assert begun.title is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "file").write_bytes(b"y" * 1000),
        lambda folder: (folder / "file").write_bytes(b"x" * 999),
        lambda folder: (folder / "file").unlink(),
        lambda folder: (folder / INDEX).write_bytes((folder / INDEX).read_bytes()[:-1]),
        lambda folder: (folder / INDEX).write_bytes(b""),
    ],
    ids=["another byte", "shorter", "missing", "torn index", "empty index"],
)
def test_a_damaged_entry_is_made_anew_and_said_so(damage, tmp_path):
    store, notes = Store(tmp_path), Notes()
    put(store, "a").close()
    damage(tmp_path / "entries" / "a")
    entry = store.take("a", "gptq", notes)
    assert entry.index is None
    assert not list(entry.folder.iterdir())
    assert "made anew" in notes.told[0]
    entry.close()


def test_an_entry_of_an_older_format_is_made_anew(tmp_path):
    store, notes = Store(tmp_path), Notes()
    put(store, "a", form=FORMAT - 1).close()
    assert not found(store, "a", notes)
    assert f"format {FORMAT - 1}" in notes.told[0]


def test_what_was_not_used_for_the_longest_goes_first_whatever_the_clock_says(tmp_path, monkeypatch):
    store = Store(tmp_path)
    clock = iter(range(10_000, 0, -1))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    for key in "abcd":
        put(store, key).close()
    assert found(store, "a")
    one = store.size() // 4
    count, freed = store.prune(2 * one + 1)
    assert count == 2
    assert freed == 2 * one
    assert [shown.key for shown in store.shown()] == ["a", "d"]
    assert not list((tmp_path / "locks").glob("[bc]*"))


def test_what_is_used_stays(tmp_path):
    store = Store(tmp_path)
    entry = put(store, "a")
    put(store, "b").close()
    begun = store.take("c", "gptq", Silent())
    assert [one.key for one in Store(tmp_path).shown() if one.used] == ["c", "a"]
    assert Store(tmp_path).prune(-1)[0] == 1
    assert {one.key for one in store.shown()} == {"a", "c"}
    entry.close()
    begun.close()
    assert store.prune(-1)[0] == 2
    assert store.size() == 0


def test_a_lost_order_removes_something_all_the_same(tmp_path):
    store = Store(tmp_path)
    for key in "ab":
        put(store, key).close()
    (tmp_path / "uses").write_bytes(b"nonsense")
    assert store.prune(store.size() // 2)[0] == 1
    assert found(store, "b")


def test_the_second_waits_for_the_first_and_finds_what_it_made(tmp_path):
    """flock belongs to an open file, so two of one process keep each other out as two processes do."""
    first = Store(tmp_path).take("a", "gptq", Silent())
    notes, entries = Notes(), []
    second = threading.Thread(target=lambda: entries.append(Store(tmp_path).take("a", "gptq", notes)))
    second.start()
    while not notes.told:
        time.sleep(0.01)
    assert not entries
    assert "waiting for process" in notes.told[0]
    write_sealed(first.folder / INDEX, Index(format=FORMAT, title="gptq", model="", seconds=0.0, files={}, content=b""))
    first.lock.share()
    second.join(timeout=10)
    assert entries[0].index is not None
    for entry in (first, *entries):
        entry.close()


HOLD = """
import sys, time
from pathlib import Path
from llmopt.pipeline.cache.locks import Lock
lock = Lock(Path(sys.argv[1]))
assert lock.take()
print("taken", flush=True)
time.sleep(60)
"""


def test_a_lock_of_a_killed_process_is_free(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "taken\n"
    lock = Lock(tmp_path / "lock")
    assert not lock.take()
    assert f"process {process.pid} on " in lock.holder()
    process.kill()
    process.communicate()
    assert (tmp_path / "lock").exists()
    assert lock.take()
    lock.release(remove=True)
    assert not (tmp_path / "lock").exists()


def test_a_lock_whose_file_was_removed_is_taken_on_the_new_one(tmp_path):
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert first.take()
    Path(tmp_path / "lock").unlink()
    assert second.take()
    assert not Lock(tmp_path / "lock").take()
    first.release()
    assert not Lock(tmp_path / "lock").take()
    second.release()


class Content(msgspec.Struct):
    values: dict[str, int | float]


def test_numbers_come_back_as_they_were(tmp_path):
    given = Content({"count": 3, "share": 0.1, "lost": float("inf")})
    write_sealed(tmp_path / "file", given)
    again = read_sealed(tmp_path / "file", Content)
    assert again == given
    assert type(again.values["count"]) is int


def test_a_sealed_file_of_something_else_is_damaged(tmp_path):
    write_sealed(tmp_path / "file", {"values": "text"})
    with pytest.raises(DamagedError):
        read_sealed(tmp_path / "file", Content)
