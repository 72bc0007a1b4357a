from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytest
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.core.facts import LinearFacts, ModelFacts
from llmopt.core.quantized import Grid, QuantizedWeight
from llmopt.exporters.onnx_codes import carry_codes, check_layout
from llmopt.exporters.onnx_readback import codes_equal, read_codes
from standin import round_to_nearest

if TYPE_CHECKING:
    import numpy as np

INT4 = Grid(bits=4, group_size=32, symmetric=True)
UINT8 = Grid(bits=8, group_size=16, symmetric=False)
WIDTH = 64


class Weights:
    """Quantized layers by name."""

    def __init__(self, grids: Mapping[str, Grid], rows: int = 32) -> None:
        import torch

        torch.manual_seed(1)
        self.weights = {name: round_to_nearest(torch.randn(rows, WIDTH), grid) for name, grid in grids.items()}

    @property
    def quantized(self) -> Mapping[str, Grid]:
        return {name: weight.grid for name, weight in self.weights.items()}

    def quantized_weight(self, name: str) -> QuantizedWeight:
        return self.weights[name]

    def value(self, name: str) -> Any:
        return self.weights[name].dequantize().numpy()


def graph_of(nodes: list[Any], constants: dict[str, Any], outputs: dict[str, int]) -> Any:
    import onnx_ir as ir
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", WIDTH])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size]) for name, size in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def node(kind: str, inputs: list[str], output: str = "y", **attributes: Any) -> Any:
    from onnx import helper

    return helper.make_node(kind, inputs, [output], **attributes)


def run(model: Any, inputs: Any) -> Any:
    import onnx_ir as ir
    import onnxruntime

    serialized = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(serialized, providers=["CPUExecutionProvider"]).run(None, {"x": inputs})[0]


def inputs() -> np.ndarray[Any, Any]:
    import numpy as np

    return np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)


def operators(model: Any) -> list[str]:
    return [node.op_type for node in model.graph]


def check_carried(model: Any, weights: Weights, expected: list[str]) -> None:
    import numpy as np

    before = run(model, inputs())
    carry_codes(model, weights, activations="float32")
    assert operators(model) == expected
    assert codes_equal(model, weights)
    assert np.abs(run(model, inputs()) - before).max() < 1e-4


def test_a_product_gets_the_codes():
    weights = Weights({"layer": INT4})
    model = graph_of([node("MatMul", ["x", "w"])], {"w": weights.value("layer").T.copy()}, {"y": 32})
    check_carried(model, weights, ["MatMulNBits"])
    ((_, blocks),) = read_codes(model)
    assert (blocks.codes == weights.weights["layer"].codes.numpy()).all()
    assert "w" not in model.graph.initializers


@pytest.mark.parametrize("transposed", [0, 1])
def test_the_bias_of_a_gemm_goes_along(transposed: int):
    weights = Weights({"layer": INT4})
    value = weights.value("layer")
    constants = {"w": value if transposed else value.T.copy(), "b": inputs()[0, :32].copy()}
    model = graph_of([node("Gemm", ["x", "w", "b"], transB=transposed)], constants, {"y": 32})
    check_carried(model, weights, ["MatMulNBits"])


def test_a_transpose_in_between_is_seen_through():
    weights = Weights({"layer": INT4})
    nodes = [node("Transpose", ["w"], "t", perm=[1, 0]), node("MatMul", ["x", "t"])]
    check_carried(graph_of(nodes, {"w": weights.value("layer")}, {"y": 32}), weights, ["MatMulNBits"])


def test_fused_and_permuted_layers_of_different_grids_are_one_product():
    import numpy as np

    weights = Weights({"q": INT4, "k": UINT8, "v": Grid(bits=3, group_size="channel", symmetric=True)})
    value = np.concatenate([weights.value(name) for name in "qkv"])
    value = value[np.random.default_rng(0).permutation(len(value))]
    model = graph_of([node("MatMul", ["x", "w"])], {"w": value.T.copy()}, {"y": 96})
    check_carried(model, weights, ["MatMulNBits"])
    ((_, blocks),) = read_codes(model)
    assert (blocks.bits, blocks.block) == (8, 16)


def test_a_fused_layer_that_is_not_quantized_stays_in_floating_point():
    import numpy as np

    weights = Weights({"q": INT4, "v": INT4})
    k = np.random.default_rng(0).standard_normal((32, WIDTH)).astype(np.float32)
    value = np.concatenate([weights.value("q"), k, weights.value("v")])
    constants = {"w": value.T.copy(), "b": np.arange(96, dtype=np.float32)}
    model = graph_of([node("Gemm", ["x", "w", "b"])], constants, {"y": 96})
    check_carried(model, weights, ["MatMulNBits", "MatMul", "MatMulNBits", "Concat", "Add"])


def test_experts_in_a_stack_are_products_of_their_own():
    import numpy as np

    weights = Weights({"expert.0": INT4, "expert.1": INT4})
    nodes = [
        node("Split", ["w"], "", axis=0, num_outputs=2),
        node("Squeeze", ["a", "zero"], "a2"),
        node("Squeeze", ["b", "zero"], "b2"),
        node("MatMul", ["x", "a2"], "ya"),
        node("MatMul", ["x", "b2"], "yb"),
        node("Add", ["ya", "yb"]),
    ]
    nodes[0].output[:] = ["a", "b"]
    stack = np.stack([weights.value("expert.0").T, weights.value("expert.1").T])
    model = graph_of(nodes, {"w": stack, "zero": np.asarray([0])}, {"y": 32})
    check_carried(model, weights, ["MatMulNBits", "MatMulNBits", "Add"])


def test_rows_of_zeros_are_nobodys_proof():
    import numpy as np
    import torch

    weights = Weights({"a": INT4, "b": UINT8})
    value = torch.zeros(32, WIDTH)
    value[:16] = torch.randn(16, WIDTH)
    for name, grid in weights.quantized.items():
        weights.weights[name] = round_to_nearest(value, grid)
    free = np.zeros((32, WIDTH), np.float32)
    constants = {name: weights.value(name).T.copy() for name in "ab"} | {"c": free.T.copy() + np.eye(WIDTH, 32) * 0.1}
    constants["c"][:, 3:5] = 0
    constants["c"] = constants["c"].astype(np.float32)
    nodes = [node("MatMul", ["x", name], f"y{name}") for name in "abc"] + [node("Sum", ["ya", "yb", "yc"])]
    check_carried(graph_of(nodes, constants, {"y": 32}), weights, ["MatMulNBits", "MatMulNBits", "MatMul", "Sum"])


def test_a_layer_that_is_not_in_the_graph_is_an_error():
    weights = Weights({"here": INT4, "elsewhere": INT4})
    model = graph_of([node("MatMul", ["x", "w"])], {"w": weights.value("here").T.copy()}, {"y": 32})
    with pytest.raises(LlmoptError, match="not in the ONNX graph") as error:
        carry_codes(model, weights, activations="float32")
    assert error.value.where is not None
    assert "elsewhere" in error.value.where


def test_a_product_that_reaches_no_output_does_not_count():
    weights = Weights({"dead": INT4})
    nodes = [node("MatMul", ["x", "w"], "unused"), node("Identity", ["x"])]
    model = graph_of(nodes, {"w": weights.value("dead").T.copy()}, {"y": WIDTH})
    with pytest.raises(LlmoptError, match="not in the ONNX graph"):
        carry_codes(model, weights, activations="float32")


@pytest.mark.parametrize("part", ["codes", "scales", "zero_points"])
def test_one_changed_number_is_noticed(part: str):
    import onnx_ir as ir

    weights = Weights({"layer": Grid(bits=4, group_size=32, symmetric=False)})
    model = graph_of([node("MatMul", ["x", "w"])], {"w": weights.value("layer").T.copy()}, {"y": 32})
    carry_codes(model, weights, activations="float32")
    value = model.graph.initializers[f"layer.{part}"]
    changed = value.const_value.numpy().copy()
    changed.reshape(-1)[5] = changed.reshape(-1)[5] * 2 if part == "scales" else changed.reshape(-1)[5] ^ 1
    value.const_value = ir.tensor(changed)
    assert not codes_equal(model, weights)


def test_a_graph_without_codes_is_not_equal():
    weights = Weights({"layer": INT4})
    model = graph_of([node("MatMul", ["x", "w"])], {"w": weights.value("layer").T.copy()}, {"y": 32})
    assert not codes_equal(model, weights)


def test_containers_larger_than_the_codes_are_told():
    weights = Weights({"layer": Grid(bits=3, group_size=32, symmetric=True)})
    model = graph_of([node("MatMul", ["x", "w"])], {"w": weights.value("layer").T.copy()}, {"y": 32})
    notes = carry_codes(model, weights, activations="int8")
    assert any("3-bit codes in 4 bits" in note for note in notes)
    assert any("int8" in note for note in notes)


def test_groups_without_a_block_are_refused():
    facts = ModelFacts(
        source="./model",
        model_type="llama",
        architecture="LlamaForCausalLM",
        dtype="float32",
        parameters=1,
        bytes=4,
        largest_block_bytes=4,
        outside_bytes=0,
        blocks=1,
        linears=(LinearFacts(name="layers.0.q", out_features=48, in_features=48),),
        has_tokenizer=True,
        config={},
    )
    check_layout(facts, Grid(bits=4, group_size=16, symmetric=True), format_name="onnx")
    with pytest.raises(UsageError, match="groups of 24"):
        check_layout(facts, Grid(bits=4, group_size=24, symmetric=True), format_name="onnx")
