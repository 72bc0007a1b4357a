"""Tracing, and that what the tests remember of it is what would be traced."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pytest
from families import FAMILIES, make_model
from llmopt.exporters import onnx_trace
from llmopt.exporters.onnx import save_graph
from tracing import TracedOnce

if TYPE_CHECKING:
    from pathlib import Path


def saved(name: str, folder: Path) -> list[str]:
    """Return hashes of the files of a graph."""
    folder.mkdir()
    save_graph(onnx_trace.trace(make_model(FAMILIES[name]), cache=FAMILIES[name].is_decoder), folder)
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())]


@pytest.mark.parametrize("name", ["bert", "qwen2"])
def test_a_remembered_trace_is_what_would_be_traced(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    remembered = onnx_trace._export
    assert isinstance(remembered, TracedOnce)
    first = saved(name, tmp_path / "first")
    monkeypatch.setattr(remembered, "export", None)
    again = saved(name, tmp_path / "again")
    monkeypatch.undo()
    monkeypatch.setattr(onnx_trace, "_export", remembered.export)
    assert first == again == saved(name, tmp_path / "fresh")


def test_another_model_is_traced(tmp_path: Path):
    import onnx_ir as ir

    asked: list[Any] = []
    empty = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10)
    once = TracedOnce(lambda *given: asked.append(given) or empty, tmp_path / "traced")
    model = make_model(FAMILIES["bert"])
    changes = (
        lambda: None,
        lambda: model.classifier.weight.data[0, 0].add_(1),
        lambda: setattr(model.config, "layer_norm_eps", 0.5),
        lambda: setattr(model.bert, "pooler", None),
    )
    inputs = {"input_ids": None, "use_cache": False}
    for count, change in enumerate(changes, 1):
        change()
        for _ in range(2):
            once(model, inputs, {}, None)
        assert len(asked) == count
    once(model, inputs, {}, 18)
    once(model, inputs | {"past_key_values": None}, {}, None)
    once(model, inputs | {"use_cache": True}, {}, None)
    assert len(asked) == len(changes) + 3
    model.forward = model.forward  # as where pooling is put behind it
    for _ in range(2):
        once(model, inputs, {}, None)
    assert len(asked) == len(changes) + 5
