"""llmopt.run.json: how the run went, beside a manifest that knows nothing of it."""

import json
import time
from datetime import datetime, timedelta

import pytest
import torch
from helpers import build, recipe
from llmopt.core.errors import LlmoptError
from llmopt.core.manifest import MANIFEST, RUN
from llmopt.core.progress import Silent
from llmopt.core.threads import DEFAULT
from llmopt.pipeline.artifact import read_run
from llmopt.pipeline.record import Recorder
from llmopt.pipeline.verify import verify


@pytest.fixture(scope="module")
def made(family, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    build(recipe(family("llama"), ("smooth", {}), ("rtn", {"group_size": 32}), data=text), folder)
    return folder


def test_every_step_is_recorded(made):
    run = read_run(made)
    assert run is not None
    assert [step.name for step in run.steps] == ["smooth + rtn", "export safetensors", "verify safetensors"]
    assert all(step.seconds > 0 and step.cpu_seconds >= 0 and step.peak_memory_bytes > 2**26 for step in run.steps)
    assert sum(step.seconds for step in run.steps) <= run.seconds
    assert max(step.peak_memory_bytes for step in run.steps) <= run.peak_memory_bytes
    assert run.threads == DEFAULT
    assert run.machine.cores >= 1
    started = datetime.fromisoformat(run.started)
    assert started.utcoffset() == timedelta(0)


def test_the_manifest_does_not_cover_it(made):
    manifest = json.loads((made / MANIFEST).read_text())
    assert RUN not in json.dumps(manifest)
    (made / RUN).rename(made.parent / "kept")
    verify(made, reporter=Silent())
    assert read_run(made) is None
    (made.parent / "kept").rename(made / RUN)


def test_a_damaged_record_says_so(tmp_path):
    (tmp_path / RUN).write_text('{"started": 3}')
    with pytest.raises(LlmoptError, match="damaged"):
        read_run(tmp_path)


def test_a_step_sees_its_own_peak_memory_and_time():
    recorder = Recorder()
    with recorder.step("large"):
        held = torch.ones(1 << 26)  # 256 MiB
        time.sleep(0.12)
        del held
    with recorder.step("small") as step:
        step.cached = True
        time.sleep(0.12)
    large, small = recorder.finish().steps
    assert large.peak_memory_bytes > small.peak_memory_bytes + (1 << 27)
    assert 0.12 <= small.seconds < 10
    assert small.cpu_seconds < small.seconds
    assert (large.cached, small.cached) == (False, True)


def test_a_clock_that_goes_backwards_changes_nothing(monkeypatch):
    now = iter(range(10**9, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    recorder = Recorder()
    with recorder.step("one"):
        pass
    run = recorder.finish()
    assert 0 <= run.steps[0].seconds <= run.seconds


def test_a_step_that_fails_is_not_kept():
    recorder = Recorder()
    with pytest.raises(ValueError, match="no"), recorder.step("one"):
        raise ValueError("no")
    assert recorder.finish().steps == []
