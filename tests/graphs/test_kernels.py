from __future__ import annotations

import onnx_ir as ir
import pytest
from llmopt.core.errors import LlmoptError
from llmopt.graphs.kernels import check_kernels


def graph_of(operator: str, domain: str = "", opset: int = 21) -> ir.Model:
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 3]))
    node = ir.node(operator, [value], domain=domain)
    graph = ir.Graph([value], list(node.outputs), nodes=[node], opset_imports={"": opset, "com.microsoft": 1})
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("operator", "domain", "opset"),
    [
        ("Relu", "", 21),
        ("Gelu", "", 20),
        ("Gelu", "com.microsoft", 20),
        ("HardSwish", "", 21),  # a function: the engine puts Mul and HardSigmoid in its place
        ("Constant", "", 21),
        ("GroupQueryAttention", "com.microsoft", 21),
        ("SimplifiedLayerNormalization", "", 21),
    ],
)
def test_what_the_engine_runs(operator: str, domain: str, opset: int):
    check_kernels(graph_of(operator, domain, opset))


@pytest.mark.parametrize(
    ("operator", "domain", "opset"),
    [
        ("RemovePadding", "com.microsoft", 21),  # known, but no kernel on a CPU
        ("Gelu", "", 19),  # the operator came with opset 20
        ("Nonsense", "", 21),
        ("Relu", "elsewhere", 21),
    ],
)
def test_what_it_does_not_run_is_named(operator: str, domain: str, opset: int):
    with pytest.raises(LlmoptError) as error:
        check_kernels(graph_of(operator, domain, opset))
    assert f"{domain or 'ai.onnx'}.{operator} of opset" in (error.value.where or "")


def test_inner_graphs_are_checked_too():
    inner = graph_of("RemovePadding", "com.microsoft").graph
    inner.inputs.clear()
    condition = ir.Value(name="c", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    node = ir.node("If", [condition], attributes={"then_branch": inner})
    model = ir.Model(ir.Graph([condition], list(node.outputs), nodes=[node], opset_imports={"": 21}), ir_version=10)
    with pytest.raises(LlmoptError, match="no CPU kernel"):
        check_kernels(model)
