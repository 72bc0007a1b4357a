"""Products in 8 bits: what they lose, and that a text does not depend on its neighbours."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import onnx
import onnxruntime
import pytest
from families import FAMILIES, make_model, make_tokenizer
from llmopt.core.errors import LlmoptError
from llmopt.core.manifest import Manifest
from llmopt.core.progress import Silent
from llmopt.core.recipe import CalibrationSpec, ModelSpec, Recipe, Step
from llmopt.graphs.int8 import Range, quantized_weight
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.run import run_plan

TEXT = Path(__file__).parents[2] / "examples" / "tiny-llama" / "calibration.txt"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    make_model(FAMILIES["bert"]).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def build(source: Path, output: Path, *passes: Step, exports: tuple[str, ...] = ("onnx",)) -> Manifest:
    recipe = Recipe(
        model=ModelSpec(id=str(source)),
        calibration=CalibrationSpec(data=str(TEXT), samples=16, length=32),
        passes=passes,
        exports=tuple(map(Step, exports)),
    )
    return run_plan(make_plan(recipe), output, force=False, reporter=Silent())


def open_graph(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options)


def alone_and_together(session: Any) -> float:
    """Return how far 50 texts alone are from the same texts in random batches."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 270, rng.integers(1, 40)) for _ in range(50)]

    def answer(rows: list[np.ndarray]) -> np.ndarray:
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        mask = np.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row)], mask[place, : len(row)] = row, 1
        return session.run(["logits"], {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 0})[0]

    alone = np.concatenate([answer([row]) for row in texts])
    order = rng.permutation(len(texts))
    largest = 0.0
    for start in range(0, len(order), 7):
        batch = order[start : start + 7]
        largest = max(largest, float(np.abs(answer([texts[place] for place in batch]) - alone[batch]).max()))
    return largest


@pytest.mark.parametrize("method", ["quantize-static", "quantize-dynamic"])
@pytest.mark.parametrize("before", [(), ("remove-padding",)], ids=["padded", "packed"])
def test_a_text_does_not_depend_on_its_neighbours(source: Path, tmp_path: Path, method: str, before: tuple[str, ...]):
    manifest = build(source, tmp_path / "out", *map(Step, before), Step(method))
    record = manifest.exports[0]
    assert record.passes[-1].metrics["products_count"] == 13  # six in each of two layers, and the pooler
    if before:
        assert 0.5 < record.passes[0].metrics["break_even_fill_ratio"] < 1
    assert ("classifier", "it makes an output of the model") in record.passes[-1].skipped
    assert record.verification is not None
    assert record.verification.mean_cosine_distance is not None
    assert 0 < record.verification.mean_cosine_distance < 0.02
    assert alone_and_together(open_graph(tmp_path / "out")) < 1e-5


def test_the_engine_multiplies_integers(source: Path, tmp_path: Path):
    build(source, tmp_path / "out", Step("quantize-static"))
    options = onnxruntime.SessionOptions()
    path = tmp_path / "optimized.onnx"
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), options)
    operators = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    assert operators["QGemm"] == 13
    assert operators["Gemm"] == 1  # the classifier


def test_sensitive_products_stay_in_float(source: Path, tmp_path: Path):
    loose = build(source, tmp_path / "loose", Step("quantize-static", {"max_drop": 0.5})).exports[0].passes[0]
    drop = loose.metrics["drop_max_ratio"]
    tight = build(source, tmp_path / "tight", Step("quantize-static", {"max_drop": drop / 2})).exports[0].passes[0]
    assert tight.metrics["drop_max_ratio"] <= drop / 2
    assert 0 < tight.metrics["products_count"] < loose.metrics["products_count"]
    assert any("its error in 8 bits" in reason for _, reason in tight.skipped)


def test_too_little_may_be_lost(source: Path, tmp_path: Path):
    with pytest.raises(LlmoptError, match="even with a single product"):
        build(source, tmp_path / "out", Step("quantize-static", {"max_drop": 1e-12}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("observer", ["percentile", "entropy", "mse"])
def test_observers_choose_narrower_ranges(source: Path, tmp_path: Path, observer: str):
    build(
        source, tmp_path / "out", Step("quantize-static", {"observer": observer, "percentile": 99.0, "max_drop": 0.2})
    )
    build(source, tmp_path / "widest", Step("quantize-static", {"max_drop": 0.2}))
    narrow, wide = (sum(input_scales(tmp_path / name)) for name in ("out", "widest"))
    # Entropy finds that no value of these few samples is to be given up.
    assert narrow == wide if observer == "entropy" else 0 < narrow < wide


def input_scales(folder: Path) -> list[float]:
    graph = onnx.load(folder / "model.onnx").graph
    scales = {node.input[1] for node in graph.node if node.op_type == "QuantizeLinear"}
    return [float(onnx.numpy_helper.to_array(each)) for each in graph.initializer if each.name in scales]


def test_ignored_products(source: Path, tmp_path: Path):
    made = (
        build(source, tmp_path / "out", Step("quantize-static", {"ignore": ["*.intermediate.*"]})).exports[0].passes[0]
    )
    assert made.metrics["products_count"] == 11
    assert sum(reason == "ignored" for _, reason in made.skipped) == 2


def test_range_holds_zero_exactly():
    for low, high in ((-1.0, 3.0), (0.0, 2.0), (-5.0, 0.0), (0.0, 0.0)):
        span = Range(low, high)
        assert 0 <= span.zero_point <= 255
        assert abs((0 - float(span.zero_point)) * span.scale - low) <= span.scale


def test_weight_codes_are_the_nearest():
    matrix = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    matrix[3] = 0
    codes, scale = quantized_weight(matrix)
    assert codes.dtype == np.int8
    assert (np.abs(codes).max(axis=1)[[0, 1, 2, 4]] == 127).all()
    assert (np.abs(codes * scale[:, None] - matrix) <= scale[:, None] / 2 + 1e-7).all()


@pytest.mark.parametrize("before", [(), ("remove-padding",)], ids=["padded", "packed"])
def test_openvino_multiplies_integers_too(source: Path, tmp_path: Path, before: tuple[str, ...]):
    openvino = pytest.importorskip("openvino")
    passes = [*map(Step, before), Step("quantize-static")]
    manifest = build(source, tmp_path / "out", *passes, exports=("openvino",))
    metrics = manifest.exports[0].passes[-1].metrics
    assert (metrics["products_count"], metrics["scores_count"]) == (13, 2)
    assert manifest.exports[0].verification is not None
    assert manifest.exports[0].verification.passed
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(tmp_path / "out" / "openvino_model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    layers = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    kinds = [(info["layerType"].astype(str), info["runtimePrecision"].astype(str)) for info in layers]
    assert sum(kind == "FullyConnected" and precision in ("u8", "i8") for kind, precision in kinds) == 13


def test_queries_and_keys_are_rounded_where_they_are_made(source: Path, tmp_path: Path):
    """Not behind the gathers of eight groups: one rounding for the queries of a layer, one for its keys."""
    pytest.importorskip("openvino")
    build(source, tmp_path / "out", Step("remove-padding"), Step("quantize-static"), exports=("openvino",))
    layers = ET.parse(tmp_path / "out" / "openvino_model.xml").getroot().find("layers")
    assert layers is not None
    # Four inputs of products and two scores in each of two layers, and the pooler's input.
    assert sum(layer.get("type") == "FakeQuantize" for layer in layers) == 2 * (4 + 2) + 1


def test_scores_stay_in_float_when_they_are_ignored(source: Path, tmp_path: Path):
    pytest.importorskip("openvino")
    made = build(
        source, tmp_path / "out", Step("quantize-static", {"ignore": ["attention.0"]}), exports=("openvino",)
    ).exports[0]
    assert made.passes[-1].metrics["scores_count"] == 1
    assert ("attention.0", "ignored") in made.passes[-1].skipped
