from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from llmopt.core.errors import LlmoptError
from llmopt.runtimes.onnx_genai import OnnxGenAI
from llmopt.runtimes.onnxruntime_ import OnnxRuntime

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 7


def counting_model(directory: Path, *, broken: bool = False) -> None:
    """Write a language model whose next token is always the sum of all tokens so far, modulo the vocabulary.

    Its cache holds the tokens: (batch, 1, past, 1).
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node
    nodes = [
        node("Cast", ["input_ids"], ["tokens"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["tokens", "new_axes"], ["fresh"]),
        node("Concat", ["past_key_values.0.key", "fresh"], ["present.0.key"], axis=2),
        node("ReduceSum", ["past_key_values.0.key", "rest"], ["before"], keepdims=0),
        node("CumSum", ["tokens", "one"], ["running"]),
        node("Unsqueeze", ["before", "one_axis"], ["before2"]),
        node("Add", ["running", "before2"], ["total"]),
        node("Mod", ["total", "size"], ["next"], fmod=1),
        node("Cast", ["next"], ["index"], to=TensorProto.INT64),
        node("OneHot", ["index", "depth", "values"], ["logits"]),
    ]
    constants = {
        "new_axes": np.asarray([1, 3]),
        "one_axis": np.asarray([1]),
        "rest": np.asarray([1, 2, 3]),
        "one": np.asarray(1),
        "size": np.asarray(VOCABULARY, np.float32),
        "depth": np.asarray(VOCABULARY),
        "values": np.asarray([0, 1], np.float32),
    }

    def value(name: str, kind: int, shape: list[Any]) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        nodes,
        "graph",
        [
            value("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            value("past_key_values.0.key", TensorProto.FLOAT, ["batch", 1, "past", 1]),
        ],
        [
            value("logits", TensorProto.FLOAT, ["batch", "sequence", VOCABULARY]),
            value("present.0.key", TensorProto.FLOAT, ["batch", 1, "total", 1]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    data = model.SerializeToString()
    (directory / "model.onnx").write_bytes(data[: len(data) // 2] if broken else data)


def test_an_empty_cache_is_supplied(tmp_path: Path):
    import numpy as np

    counting_model(tmp_path)
    outputs = OnnxRuntime().open(tmp_path, threads=1).outputs({"input_ids": np.asarray([[1, 2, 3], [0, 0, 5]])})
    assert list(outputs) == ["logits"]
    assert outputs["logits"].argmax(-1).tolist() == [[1, 3, 6], [0, 0, 5]]


def test_generating_goes_through_the_cache(tmp_path: Path):
    counting_model(tmp_path)
    session = OnnxRuntime().open(tmp_path)
    assert session.generate([1, 2], 5) == [3, 6, 5, 3, 6]
    session.close()


def test_a_broken_file_is_refused_before_the_engine_sees_it(tmp_path: Path):
    counting_model(tmp_path, broken=True)
    with pytest.raises(LlmoptError, match="is damaged") as error:
        OnnxRuntime().open(tmp_path)
    assert error.value.where is not None
    assert "protobuf" in error.value.where


def test_a_missing_input_is_named(tmp_path: Path):
    counting_model(tmp_path)
    with pytest.raises(LlmoptError, match="input_ids"):
        OnnxRuntime().open(tmp_path).outputs({})


def test_a_genai_folder_that_does_not_load(tmp_path: Path):
    (tmp_path / "genai_config.json").write_text("{}")
    with pytest.raises(LlmoptError, match="does not load"):
        OnnxGenAI().open(tmp_path)


def test_folders_are_told_apart_by_their_files(tmp_path: Path):
    assert not OnnxRuntime().opens(tmp_path)
    (tmp_path / "model.onnx").touch()
    assert OnnxRuntime().opens(tmp_path)
    (tmp_path / "genai_config.json").touch()
    assert not OnnxRuntime().opens(tmp_path)
    assert OnnxGenAI().opens(tmp_path)


def test_versions():
    assert OnnxRuntime().version().startswith("onnxruntime 1.")
    assert OnnxGenAI().version().startswith("onnxruntime-genai 0.")
