"""A graph as the model of a recipe: from a file or a folder, through passes, to an artifact that is verified."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from helpers import build, recipe
from llmopt.core.progress import Silent
from llmopt.pipeline.verify import verify

if TYPE_CHECKING:
    from pathlib import Path

ONNX = ("onnx", {})


@pytest.fixture(scope="module")
def artifact(family: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return an exported model of a family: `artifact("bert", ("rtn", {...}))`."""

    def made(name: str, *passes: Any) -> Path:
        folder = tmp_path_factory.mktemp(name) / "artifact"
        build(recipe(family(name), *passes, export=("onnx", {"fuse": False})), folder)
        return folder

    return made


def test_an_artifact_is_a_source_again(artifact: Any, tmp_path: Path):
    folder = artifact("bert")
    manifest = build(recipe(folder, ("remove-padding", {}), ("fold", {}), export=ONNX), tmp_path / "out")
    (record,) = manifest.exports
    assert record.verification is not None
    assert record.verification.passed
    assert [one.name for one in record.passes] == ["remove-padding", "fold"]
    assert record.passes[0].metrics["attentions_count"] == 2
    assert manifest.source["architecture"] == "BertForSequenceClassification"
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"model.onnx", "config.json", "tokenizer.json", "llmopt.json"}
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((folder / "config.json").read_text())
    verify(tmp_path / "out", reporter=Silent())


def test_sizes_are_fixed_and_the_verification_keeps_to_them(artifact: Any, tmp_path: Path):
    steps = (("fix-shapes", {"batch": 2, "sequence": 12}), ("convert-opset", {"opset": 18}))
    manifest = build(recipe(artifact("bert"), *steps, export=ONNX), tmp_path / "out")
    model = ir.load(tmp_path / "out/model.onnx")
    assert [list(value.shape or ()) for value in model.graph.inputs] == [[2, 12]] * len(model.graph.inputs)
    assert model.opset_imports[""] == 18
    verification = manifest.exports[0].verification
    assert verification is not None
    assert verification.passed
    verify(tmp_path / "out", reporter=Silent())


def test_sizes_of_a_traced_model_are_fixed_too(family: Any, tmp_path: Path):
    steps = [("fix-shapes", {"batch": 1, "sequence": 16, "axes": {"past_sequence": 0}}), ("simplify", {})]
    build(recipe(family("llama"), *steps, export=ONNX), tmp_path / "out")
    shapes = {value.name: list(value.shape or ()) for value in ir.load(tmp_path / "out/model.onnx").graph.inputs}
    assert shapes["input_ids"] == shapes["attention_mask"] == [1, 16]


def test_a_quantized_graph_keeps_its_codes(artifact: Any, tmp_path: Path):
    folder = artifact("llama", ("rtn", {"bits": 4, "group_size": 32}))
    build(recipe(folder, ("fold", {}), ("simplify", {}), export=ONNX), tmp_path / "out")

    def codes(path: Path) -> list[Any]:
        nodes = [node for node in ir.load(path).graph if node.op_type == "MatMulNBits"]
        return [value.const_value.numpy() for node in nodes for value in node.inputs[1:3]]

    before, after = codes(folder / "model.onnx"), codes(tmp_path / "out/model.onnx")
    assert len(before) == len(after) > 0
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


def test_codes_find_their_products_in_a_folded_graph(family: Any, tmp_path: Path):
    steps = [("rtn", {"bits": 4, "group_size": 32}), ("fold", {}), ("simplify", {})]
    manifest = build(recipe(family("llama"), *steps, export=ONNX), tmp_path / "out")
    assert manifest.exports[0].verification is not None
    assert manifest.exports[0].verification.weights_equal


def test_the_same_graph_gives_the_same_bytes(artifact: Any, tmp_path: Path):
    folder = artifact("gpt2")
    for name in ("a", "b"):
        build(recipe(folder, ("fold", {}), ("simplify", {}), export=ONNX), tmp_path / name)
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_inputs_of_any_kind_are_made_up(tmp_path: Path):
    import onnx

    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[batch, 3, width] pixels, bool[batch] flag) => '
    text += "(float[A, B, C] y) { z = Relu (pixels) y = Identity (z) }"
    onnx.save(onnx.parser.parse_model(text), tmp_path / "odd.onnx")
    manifest = build(recipe(tmp_path / "odd.onnx", ("fold", {}), export=ONNX), tmp_path / "out")
    assert manifest.exports[0].verification is not None
    assert manifest.exports[0].verification.samples == "made-up inputs"
