"""Weights of a graph as codes: the codes are ours, the engine computes with them, and nothing is stored twice."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from helpers import build, recipe
from llmopt.core.errors import LlmoptError, UnmetError, UsageError
from llmopt.core.facts import ModelFacts
from llmopt.core.graph import GraphModel
from llmopt.core.passes import PassContext, PassResult
from llmopt.exporters.onnx_readback import codes_equal, read_codes
from llmopt.graphs.nbits import digest
from llmopt.passes.quantize_weights import QuantizeWeights, QuantizeWeightsParams
from running import written

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ONNX = ("onnx", {"fuse": False})
FACTS = ModelFacts(
    source="made up",
    model_type="",
    architecture="",
    dtype="float32",
    parameters=1,
    bytes=1,
    largest_block_bytes=1,
    outside_bytes=1,
    blocks=1,
    linears=(),
    has_tokenizer=False,
    config={},
)


class NothingQuantized:
    quantized: ClassVar[dict[str, Any]] = {}


def quantize(model: ir.Model, **params: Any) -> tuple[PassResult, GraphModel]:
    state = GraphModel(graph=model, facts=FACTS, engine="onnxruntime")
    return QuantizeWeights(QuantizeWeightsParams(**params)).run(state, PassContext()), state


def table_and_head(width: int = 64, rows: int = 128, *, tied: bool = True, kind: type = np.float32) -> ir.Model:
    """Return ids -> table -> times a matrix -> times the table again, or a head of its own."""
    rng = np.random.default_rng(0)
    name = {np.float32: "float", np.float16: "float16"}[kind]
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (int64[batch, tokens] input_ids) => ({name}[B, T, V] logits)'
    text += "{ h = Gather <axis: int = 0> (wte, input_ids) p = MatMul (h, inner) q = Add (p, bias) "
    text += (
        "t = Transpose <perm: ints = [1, 0]> (wte) logits = MatMul (q, t) }" if tied else "logits = MatMul (q, head) }"
    )
    arrays = {
        "wte": rng.standard_normal((rows, width)),
        "inner": rng.standard_normal((width, width)) / np.sqrt(width),
        "bias": rng.standard_normal(width),
    }
    if not tied:
        arrays["head"] = rng.standard_normal((width, rows))
    return written(text, **{key: array.astype(kind) for key, array in arrays.items()})


def answers(model: ir.Model) -> np.ndarray[Any, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return session.run(None, {"input_ids": np.array([[3, 9, 40], [99, 0, 1]])})[0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [64, 40])
@pytest.mark.parametrize("tied", [True, False])
def test_the_engine_computes_with_the_codes(bits: Any, symmetric: bool, width: int, tied: bool):
    model = table_and_head(width, tied=tied)
    exact = model.clone()
    settings = {"bits": bits, "embeddings": bits, "symmetric": symmetric, "activations": "float32"}
    result, state = quantize(model, **settings)
    assert sorted(result.changed) == (["inner", "wte"] if tied else ["head", "inner", "wte"])
    assert not result.skipped
    operators = Counter(node.op_type for node in model.graph)
    assert operators["MatMulNBits"] == 2
    assert operators["GatherBlockQuantized"] == 1
    assert not operators["Gather"] + operators["MatMul"]
    assert codes_equal(model, NothingQuantized(), state.rounded)
    # The float graph, with what the codes stand for in the place of its weights, gives the same.
    for _, blocks in read_codes(model):
        for name, value in exact.graph.initializers.items():
            for transposed in (False, True):
                weight = value.const_value.numpy()
                weight = weight.T if transposed else weight
                made = blocks.dequantize()
                close = weight.shape == made.shape and np.abs(weight - made).max() < 0.5
                if close and np.corrcoef(weight.ravel(), made.ravel())[0, 1] > 0.98:
                    value.const_value = ir.tensor(np.ascontiguousarray(made.T if transposed else made), name=name)
    expected, got = answers(exact), answers(model)
    assert np.abs(expected - got).max() <= 2e-5 * np.abs(expected).max()


def test_a_tied_head_reads_the_same_codes_as_the_embeddings():
    model = table_and_head()
    quantize(model, bits=4, embeddings=8)
    nodes = {node.op_type: node for node in model.graph}
    heads = [node for node in model.graph if node.op_type == "MatMulNBits" and node.attributes["N"].as_int() == 128]
    assert heads[0].attributes["bits"].as_int() == 8
    assert nodes["GatherBlockQuantized"].inputs[0] is heads[0].inputs[1]
    bytes_of_codes = [value.const_value.nbytes for value in model.graph.initializers.values() if "codes" in value.name]
    assert sorted(bytes_of_codes) == [64 * 64 // 2, 128 * 64]


def test_a_table_that_stays_in_float_keeps_its_codes_away():
    """Codes beside the float table would make the file larger."""
    model = table_and_head()
    with pytest.raises(LlmoptError, match="no weight") as error:
        quantize(model, products="none")
    assert "a product reads it in floating point too" in (error.value.where or "")
    result, _ = quantize(model, embeddings="none", ignore=("inner",))
    assert result.changed == ["wte"]
    assert ("inner", "ignored by `inner`") in result.skipped
    assert "Gather" in {node.op_type for node in model.graph}


def test_float16_weights_get_float16_scales():
    model = table_and_head(kind=np.float16)
    exact = answers(model).astype(np.float32)
    _, state = quantize(model, bits=8)
    scales = [value for name, value in model.graph.initializers.items() if "scales" in name]
    assert scales
    assert {value.dtype for value in scales} == {ir.DataType.FLOAT16}
    assert codes_equal(model, NothingQuantized(), state.rounded)
    assert np.abs(answers(model) - exact).max() < 0.05 * np.abs(exact).max()


def test_bytes_in_standard_operators():
    model = table_and_head(tied=False)
    result, state = quantize(model, products="none", operators="standard")
    assert result.changed == ["wte"]
    assert {node.domain for node in model.graph} == {""}
    assert model.graph.initializers["wte.codes"].dtype == ir.DataType.INT8
    assert codes_equal(model, NothingQuantized(), state.rounded)
    (blocks,) = [blocks for _, blocks in read_codes(model)]
    table = table_and_head(tied=False).graph.initializers["wte"].const_value.numpy()
    assert np.abs(blocks.dequantize() - table).max() <= blocks.scale.max() * 1.5


def test_what_is_read_back_must_be_what_was_made():
    model = table_and_head(tied=False)
    _, state = quantize(model)
    assert codes_equal(model, NothingQuantized(), state.rounded)
    value = model.graph.initializers["inner.codes"]
    damaged = value.const_value.numpy().copy()
    damaged[0, 0, 0] ^= 1
    value.const_value = ir.tensor(damaged, name=value.name)
    assert not codes_equal(model, NothingQuantized(), state.rounded)
    assert len({digest(np.zeros(3, np.uint8)), digest(np.zeros(3, np.int8)), digest(np.zeros(4, np.uint8))}) == 3


def test_the_search_loses_less_than_the_whole_range():
    errors = [quantize(table_and_head(), clip=clip)[0].metrics["error_max_ratio"] for clip in ("mse", "none")]
    assert 0 < errors[0] < errors[1] < 0.02


def test_what_no_kernel_takes_is_left_with_its_reason():

    rng = np.random.default_rng(0)
    text = '<ir_version: 10, opset_import: ["" : 21]> g (int64[B, T] input_ids, int64[B, T] position_ids, '
    text += "float[B, 8] small, double[B, 32] wide, float[32] single) => (float[B, T, 63] a, float[B, T, 64] b, "
    text += "float[B, 16] c, double[B, 16] d, float[16] e, float[B, T, 2] f) { a = Gather (odd, input_ids) "
    text += "b = Gather (places, position_ids) c = MatMul (small, narrow) d = MatMul (wide, doubles) "
    text += "e = MatMul (single, vectors) f = Gather (few, input_ids) }"
    model = written(
        text,
        odd=rng.standard_normal((100, 63)).astype(np.float32),
        places=rng.standard_normal((100, 64)).astype(np.float32),
        narrow=rng.standard_normal((8, 16)).astype(np.float32),
        doubles=rng.standard_normal((32, 16)),
        vectors=rng.standard_normal((32, 16)).astype(np.float32),
        few=rng.standard_normal((100, 2)).astype(np.float32),
    )
    with pytest.raises(LlmoptError, match="no weight of the graph") as error:
        quantize(model, embeddings=4)
    for reason in (
        "63 codes of 4 bits do not fill whole bytes",
        "its rows are chosen by position",
        "its 8 inputs are fewer than the smallest block",
        "MatMulNBits has no kernel for double",
        "its input is a single vector",
        "a table of 200 numbers is not worth it",
    ):
        assert reason in (error.value.where or "")


def test_the_products_that_patterns_name():
    result, _ = quantize(table_and_head(tied=False), products=("inn*",), embeddings="none")
    assert result.changed == ["inner"]
    assert dict(result.skipped) == {"head": "its product was not named", "wte": "embeddings are left as they are"}


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"products": "none", "embeddings": "none"}, "nothing to do"),
        ({"operators": "standard"}, "no standard operators for `products: all`"),
        ({"operators": "standard", "products": "none", "embeddings": 4}, "for `embeddings: 4`"),
        ({"operators": "standard", "products": "none", "group_size": 64}, "for `group_size: 64`"),
        ({"operators": "standard", "products": "none", "symmetric": False}, "for `symmetric: false`"),
    ],
)
def test_parameters_that_cannot_work(params: dict[str, Any], match: str, family: Callable[[str], Path]):
    with pytest.raises(UsageError, match=match):
        build(recipe(family("bert"), ("quantize-weights", params), export=ONNX), family("bert") / "out")


@pytest.mark.parametrize(
    ("engine", "name"),
    [*(("onnx", name) for name in ("bert", "llama", "gpt2", "t5", "gemma2", "mixtral")), ("openvino", "llama")],
)
def test_families(name: str, engine: str, family: Callable[[str], Path], tmp_path: Path):
    export = ONNX
    if engine == "openvino":
        pytest.importorskip("openvino")
        export = ("openvino", {})
    manifest = build(
        recipe(family(name), ("quantize-weights", {"bits": 8, "activations": "float32"}), export=export), tmp_path / "o"
    )
    (record,) = manifest.exports
    assert record.verification is not None
    assert record.verification.passed
    assert record.verification.weights_equal is True
    assert record.passes[0].metrics["embeddings_count"] == 1
    assert record.passes[0].metrics["products_count"] >= 9
    assert record.verification.mean_cosine_distance < (
        1e-2 if name == "mixtral" else 1e-3
    )  # its routers change their minds


@pytest.mark.parametrize(("name", "symmetric"), [("gpt2", True), ("bert", False)])
def test_codes_of_4_bits_are_read_back_from_openvino(
    name: str, symmetric: bool, family: Callable[[str], Path], tmp_path: Path
):
    pytest.importorskip("openvino")
    params = {"bits": 4, "embeddings": 4, "symmetric": symmetric, "max_drop": 0.2}
    made = recipe(family(name), ("quantize-weights", params), export=("openvino", {}))
    verification = build(made, tmp_path / "out").exports[0].verification
    assert verification is not None
    assert verification.passed
    assert verification.weights_equal is True


def test_codes_of_torch_passes_stay(family: Callable[[str], Path], tmp_path: Path):
    steps = [("rtn", {"bits": 4, "group_size": 32, "clip": "none"}), ("quantize-weights", {"clip": "mse"})]
    manifest = build(recipe(family("llama"), *steps, export=ONNX), tmp_path / "both")
    build(recipe(family("llama"), steps[0], export=ONNX), tmp_path / "one")
    record = manifest.exports[0]
    assert record.verification is not None
    assert record.verification.weights_equal is True
    assert record.passes[0].changed  # the embeddings and the head

    def codes(folder: Path) -> set[str]:
        return {digest(blocks.codes) for _, blocks in read_codes(ir.load(folder / "model.onnx"))}

    assert codes(tmp_path / "one") < codes(tmp_path / "both")


def test_embeddings_beside_products_in_8_bits(family: Callable[[str], Path], tmp_path: Path):
    embeddings = ("quantize-weights", {"products": "none", "embeddings": 8})
    manifest = build(
        recipe(family("bert"), ("remove-padding", {}), ("quantize-dynamic", {}), embeddings, export=ONNX),
        tmp_path / "out",
    )
    record = manifest.exports[0]
    assert record.passes[-1].changed == ["bert.embeddings.word_embeddings"]
    assert record.verification is not None
    assert record.verification.passed


def test_a_foreign_graph(foreign: Callable[..., Path], tmp_path: Path):
    for dynamo in (False, True):
        source = foreign("bert", dynamo=dynamo)
        manifest = build(recipe(source, ("quantize-weights", {"bits": 8}), export=ONNX), tmp_path / str(dynamo))
        record = manifest.exports[0]
        assert record.verification is not None
        assert record.verification.weights_equal is True
        assert record.passes[0].metrics["products_count"] >= 12
        assert record.passes[0].metrics["embeddings_count"] == 1


def test_too_much_is_lost(family: Callable[[str], Path], tmp_path: Path):
    step = ("quantize-weights", {"bits": 4, "group_size": 256, "max_drop": 1e-6})
    with pytest.raises(UnmetError, match="is not the model"):
        build(recipe(family("bert"), step, export=ONNX), tmp_path / "out")
