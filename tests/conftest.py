"""Tiny models, saved once a session, without the network."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ["LLMOPT_CACHE_SIZE"] = "0"  # of commands that fixtures of a session or a module run


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Return the cache of this test's commands; each has its own, and none touches the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(folder))
    monkeypatch.delenv("LLMOPT_CACHE_SIZE", raising=False)
    return folder


@pytest.fixture(autouse=True)
def settled():
    """Leave a million objects of imported libraries out of the collections that every verification ends with."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def traced_once(tmp_path_factory):
    """Trace a model once, whichever process does; `fresh_traces` is for tests of the tracer."""
    from llmopt.exporters import onnx_trace
    from tracing import TracedOnce

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "traced"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_trace, "_export", TracedOnce(onnx_trace._export, folder))
        yield


@pytest.fixture
def fresh_traces(monkeypatch):
    """Trace a model each time."""
    from llmopt.exporters import onnx_trace

    monkeypatch.setattr(onnx_trace, "_export", onnx_trace._export.export)


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """Return the folder of a tiny model: `family("llama")`, `family("llama", dtype="bfloat16", hidden_size=32)`."""
    import torch
    from families import save_family

    torch.set_num_threads(1)
    saved = {}

    def folder(name, **changes):
        key = (name, *sorted((field, repr(value)) for field, value in changes.items()))
        if key not in saved:
            saved[key] = save_family(name, tmp_path_factory.mktemp(name) / name, **changes)
        return saved[key]

    return folder


@pytest.fixture(scope="session")
def resident_llmopt():
    """Return the path of a command `llmopt`, offline, that need not import anything first; see `resident`."""
    from resident import resident

    with TemporaryDirectory() as folder:  # where names are short enough for a socket
        yield from resident(Path(folder))


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Return a text file long enough to calibrate on."""
    from families import LINES

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{number} {LINES[number % 3]}\n" for number in range(200)), encoding="utf-8")
    return path
