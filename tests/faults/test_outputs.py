"""Two runs on one output, and what runs that were killed have left beside it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from llmopt.core.errors import UsageError
from llmopt.pipeline.output import staging

HOLD = """
import sys, time
from pathlib import Path
from llmopt.pipeline.output import staging
with staging(Path(sys.argv[1]), force=True) as stage:
    (stage.root / "llmopt.json").write_text("{}")
    print(stage.root, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Return a process that writes `out`, and the folder that it works in."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield process, Path(process.stdout.readline().strip()).parent
    process.kill()
    process.communicate()


def begin(output):
    with staging(output, force=True):
        return list(output.parent.glob(f".{output.name}.*"))


def test_the_second_run_on_an_output_is_refused_and_told_who_writes_it(other, tmp_path):
    process, folder = other
    with pytest.raises(UsageError) as caught:
        begin(tmp_path / "out")
    assert "another run writes" in caught.value.what
    assert f"process {process.pid} on " in caught.value.where
    assert list(tmp_path.iterdir()) == [folder]
    assert process.poll() is None


@pytest.mark.parametrize("name", ["out.int4", "ou", "out2"])
def test_another_output_beside_it_is_not(other, tmp_path, name):
    assert len(begin(tmp_path / name)) == 1
    assert other[1].exists()


def test_what_a_killed_run_has_left_is_removed_by_the_next(other, tmp_path):
    process, folder = other
    process.kill()
    process.wait()
    assert folder.exists()
    (mine,) = begin(tmp_path / "out")
    assert mine != folder
    assert not list(tmp_path.iterdir())


def test_a_former_artifact_comes_back_where_a_run_was_killed_as_it_replaced_it(tmp_path):
    left = tmp_path / ".out.abcd1234.former"
    (left / "artifact").mkdir(parents=True)
    (left / "artifact" / "llmopt.json").write_text("{}")
    with pytest.raises(ValueError, match="stop"), staging(tmp_path / "out", force=True):
        raise ValueError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "llmopt.json").read_text() == "{}"


def test_one_that_was_replaced_already_is_removed(tmp_path):
    (tmp_path / ".out.abcd1234.former" / "artifact").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    begin(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_without_locks_stops_nobody(other, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr("llmopt.pipeline.cache.locks.fcntl.flock", refused)
    assert len(begin(tmp_path / "out")) == 2
    assert other[1].exists()


def test_a_process_that_helps_to_train_works_beside_the_one_that_writes(other, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert len(begin(tmp_path / "out")) == 2
    assert other[1].exists()
