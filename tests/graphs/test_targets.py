"""Graphs for a GPU and for small devices: only operators that are known to run there, and the same answers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from helpers import build, recipe
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.graphs import kernels
from llmopt.graphs.fusion import fuse_for_cuda
from llmopt.graphs.running import made_up, outputs
from running import written

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize(
    ("name", "heads", "left"),
    [("roberta", 2, 0), ("distilbert", 2, 0), ("vit", 2, 0), ("t5", 0, 6), ("llama", 0, 2)],
)
def test_attention_for_cuda(name: str, heads: int, left: int, traced: Callable[[str], ir.Model]):
    model = traced(name)
    feed = made_up(model, 200, 0)
    if "attention_mask" in feed and name != "llama":
        feed["attention_mask"][0, -5:] = 0
    (exact,) = outputs(model, [feed])
    report = fuse_for_cuda(model)
    (got,) = outputs(model, [feed])
    operators = Counter(node.op_type for node in model.graph)
    assert operators["MultiHeadAttention"] == report.counts["multi_head_attention"] == heads
    assert len([reason for name, reason in report.left if name.startswith("attention")]) == left
    assert not operators["GroupQueryAttention"]
    for one, two in zip(exact, got, strict=True):
        assert np.abs(one).max() > 0
        assert np.abs(one - two)[-1].max() <= 1e-4 * max(1, np.abs(one).max())  # the second text has no padding
        tokens = one.shape[1:2] == (24,) and name != "llama"
        assert np.abs(one - two)[0][: 19 if tokens else None].max() <= 1e-4 * max(1, np.abs(one).max())


def test_the_masked_keys_count(traced: Callable[[str], ir.Model]):
    """What stands at a masked place has no say in the others, and would have without the mask."""
    model = traced("roberta")
    fuse_for_cuda(model)
    feed = made_up(model, 200, 0)
    other = {name: array.copy() for name, array in feed.items()}
    other["input_ids"][:, -4:] = 7
    same = []
    for hidden in (0, 1):
        for each in (feed, other):
            each["attention_mask"][:, -4:] = hidden
        one, two = outputs(model, [feed, other])
        same.append(float(np.abs(one[0] - two[0])[:, :-4].max()))
    assert same[0] < 1e-5 < same[1]


def test_an_operator_without_a_known_kernel_is_refused(monkeypatch: pytest.MonkeyPatch):
    text = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1, "llmopt" : 1]> g (float[2, 8] x) => '
    text += "(float[2, 8] y) { a = com.microsoft.FastGelu (x) b = com.microsoft.QMoE (a) y = Relu (b) }"
    assert kernels.without_cuda_kernel(written(text)) == ["com.microsoft.QMoE"]
    # An engine that was built for CUDA is asked.
    known = {(kernels.CUDA, "com.microsoft", "QMoE"): [(1, 2**31 - 1)]}
    monkeypatch.setattr(kernels, "_kernels", lambda: known)
    assert kernels.can_be_asked(kernels.CUDA)
    assert kernels.without_cuda_kernel(written(text)) == ["com.microsoft.FastGelu"]
    with pytest.raises(LlmoptError, match=r"no CUDA kernel is known for com\.microsoft\.FastGelu"):
        fuse_for_cuda(written(text))


def test_for_a_gpu(family: Callable[[str], Path], tmp_path: Path):
    steps = [("fuse", {"target": "gpu"}), ("cast-fp16", {})]
    record = build(recipe(family("distilbert"), *steps, export=("onnx", {})), tmp_path / "out").exports[0]
    assert record.verification is not None
    assert record.verification.passed
    assert record.passes[0].metrics["multi_head_attention_count"] == 2
    notes = " ".join(record.passes[0].notes)
    assert kernels.can_be_asked(kernels.CUDA) or ("no CUDA kernels to ask" in notes and "on the CPU only" in notes)
    model = ir.load(tmp_path / "out/model.onnx")
    kinds = {value.dtype for value in model.graph.initializers.values() if value.const_value.size > 64}
    assert ir.DataType.FLOAT not in kinds


def test_for_small_devices(family: Callable[[str], Path], text: Path, tmp_path: Path):
    steps: list[tuple[str, dict[str, Any]]] = [
        ("fold", {}),
        ("simplify", {}),
        ("quantize-static", {}),
        ("quantize-weights", {"products": "none", "operators": "standard"}),
        ("fix-shapes", {"batch": 1, "sequence": 24}),
    ]
    made = recipe(family("bert"), *steps, export=("onnx", {}), data=text)
    record = build(made, tmp_path / "out").exports[0]
    assert record.verification is not None
    assert record.verification.passed
    assert record.verification.weights_equal is True
    model = ir.load(tmp_path / "out/model.onnx")
    assert {node.domain for node in model.graph} == {""}
    assert all(isinstance(each, int) for value in model.graph.inputs for each in value.shape or ())
    operators = Counter(node.op_type for node in model.graph)
    assert operators["QuantizeLinear"] > 5
    assert operators["Gemm"] >= 13


def test_padding_is_a_matter_of_the_cpu(family: Callable[[str], Path], tmp_path: Path):
    made = recipe(family("bert"), ("fuse", {"target": "gpu", "padding": "left"}), export=("onnx", {}))
    with pytest.raises(UsageError, match="is for a CPU"):
        build(made, tmp_path / "out")
