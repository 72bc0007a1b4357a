"""`llmopt cache`: what is shown, what is removed, and where it lies."""

import json
from pathlib import Path

import pytest
from llmopt.core.progress import Silent
from llmopt.pipeline.cache.store import FORMAT, Index, Store


@pytest.fixture
def filled(cache):
    """Return a store of two finished entries and one that a killed run has begun."""
    store = Store(cache)
    for key in ("aaaa", "bbbb", "cccc"):
        entry = store.take(key * 10, "gptq", Silent())
        (entry.folder / "file").write_bytes(bytes(2048))
        if key != "cccc":
            entry.finish(Index(format=FORMAT, title="gptq", model="tiny", seconds=75.0, files={}, content=b""))
        entry.close()
    return store


def test_list(llmopt, filled):
    ended = llmopt("cache", "list")
    assert ended.code == 0
    lines = [line.split() for line in ended.out.splitlines()]
    assert lines[2][:2] == ["cccccccccccc", "(not"]
    assert lines[3][:3] == ["bbbbbbbbbbbb", "gptq", "tiny"]
    assert lines[3][-2:] == ["75", "s"]
    document = json.loads(llmopt("cache", "list", "--json").out)
    assert [one["title"] for one in document["entries"]] == [None, "gptq", "gptq"]
    assert all(one["bytes"] >= 2048 for one in document["entries"])


def test_size_prune_and_clear(llmopt, filled, monkeypatch):
    monkeypatch.setenv("LLMOPT_CACHE_SIZE", "1MiB")
    document = json.loads(llmopt("cache", "size", "--json").out)
    assert document == {"directory": str(filled.folder), "bytes": filled.size(), "limit_bytes": 1 << 20}
    assert json.loads(llmopt("cache", "prune", "--json").out)["removed"] == 0
    assert json.loads(llmopt("cache", "prune", "--max-size", "5KiB", "--json").out)["removed"] == 1
    assert [one.key[:4] for one in filled.shown()] == ["cccc", "bbbb"]
    document = json.loads(llmopt("cache", "clear", "--json").out)
    assert (document["removed"], document["bytes"]) == (2, 0)
    assert llmopt("cache", "list").out.splitlines()[1].strip() == "empty"


def test_another_folder(llmopt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert json.loads(llmopt("cache", "size", "--cache-dir", "other", "--json").out)["directory"] == "other"
    assert Path("other/entries").is_dir()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("lits",), "unknown action `lits`"),
        (("list", "--max-size", "1GiB"), "--max-size does not apply to list"),
        (("prune", "--max-size", "much"), "`much` is no amount of memory"),
    ],
)
def test_what_is_refused(llmopt, arguments, what):
    ended = llmopt("cache", *arguments)
    assert ended.code == 2
    assert what in ended.err


def test_a_bad_size_in_the_environment_is_refused_before_anything_is_done(llmopt, pipeline, monkeypatch):
    monkeypatch.setenv("LLMOPT_CACHE_SIZE", "many")
    ended = llmopt("quantize", "model", "-o", "out")
    assert ended.code == 2
    assert "LLMOPT_CACHE_SIZE" in ended.err
    assert "run" not in pipeline


@pytest.mark.parametrize(("options", "size"), [(("--no-cache",), None), ((), "0")])
def test_the_cache_can_be_turned_off(llmopt, pipeline, monkeypatch, options, size):
    if size is not None:
        monkeypatch.setenv("LLMOPT_CACHE_SIZE", size)
    assert llmopt("quantize", "model", "-o", "out", *options).code == 0
    assert pipeline["cache"] is None
