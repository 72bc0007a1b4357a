from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt.core.quantized import Grid
from llmopt.graphs.nbits import (
    Blocks,
    block_size,
    common_layout,
    container_bits,
    pack_codes,
    pack_zero_points,
    to_blocks,
    unpack_codes,
    unpack_zero_points,
)
from standin import round_to_nearest


@pytest.mark.parametrize(("bits", "container"), [(2, 2), (3, 4), (4, 4), (5, 8), (6, 8), (8, 8)])
def test_codes_go_into_the_smallest_container(bits: int, container: int):
    assert container_bits(bits) == container


@pytest.mark.parametrize(
    ("group_size", "width", "block"),
    [
        (16, 64, 16),
        (128, 512, 128),
        (256, 512, 256),
        (512, 1024, 128),
        (48, 96, 16),
        (96, 192, 32),
        (24, 96, None),
        (8, 64, None),
        ("channel", 64, 64),
        ("channel", 500, 128),
        ("tensor", 50, 64),
        ("tensor", 8, 16),
        (500, 500, 128),
    ],
)
def test_block_for_a_group(group_size: Any, width: int, block: int | None):
    assert block_size(Grid(bits=4, group_size=group_size, symmetric=True), width) == block


def test_rows_of_two_grids_share_the_smaller_block_and_the_larger_container():
    grids = [Grid(bits=2, group_size=64, symmetric=True), Grid(bits=8, group_size="channel", symmetric=False)]
    assert common_layout((grid, 128) for grid in grids) == (8, 64)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8]),
    block=st.sampled_from([16, 32, 64]),
    rows=st.integers(1, 5),
    width=st.integers(1, 150),
    seed=st.integers(0, 9),
)
def test_packing_loses_nothing(bits: int, block: int, rows: int, width: int, seed: int):
    import numpy as np

    random = np.random.default_rng(seed)
    count = -(-width // block)
    codes = random.integers(0, 1 << bits, (rows, width), np.uint8)
    zero = random.integers(0, 1 << bits, (rows, count), np.uint8)
    blocks = Blocks(codes, np.ones((rows, count), np.float32), zero, bits, block)
    packed = pack_codes(blocks)
    assert packed.shape == (rows, count, block * bits // 8)
    assert (unpack_codes(packed, bits, width) == codes).all()
    assert (unpack_zero_points(pack_zero_points(blocks), bits, zero.shape) == zero).all()


@pytest.mark.parametrize("group_size", [16, 48, 64, "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_engine_computes_with_the_weight(bits: int, symmetric: bool, group_size: Any):
    import numpy as np
    import torch

    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric)
    torch.manual_seed(0)
    weight = round_to_nearest(torch.randn(24, 192), grid)
    layout = common_layout([(grid, 192)])
    assert layout is not None
    blocks = to_blocks(weight, *layout)
    assert (blocks.dequantize() == weight.dequantize(torch.float32).numpy()).all()
    inputs = np.random.default_rng(0).standard_normal((3, 192)).astype(np.float32)
    expected = inputs @ weight.dequantize().numpy().T
    assert np.abs(run(blocks, inputs) - expected).max() < 1e-4


def test_the_engine_takes_rows_that_are_no_whole_number_of_blocks():
    import numpy as np
    import torch

    grid = Grid(bits=4, group_size="channel", symmetric=False)
    torch.manual_seed(0)
    weight = round_to_nearest(torch.randn(24, 150), grid)
    inputs = np.random.default_rng(0).standard_normal((3, 150)).astype(np.float32)
    expected = inputs @ weight.dequantize().numpy().T
    assert np.abs(run(to_blocks(weight, 4, 128), inputs) - expected).max() < 1e-4


def run(blocks: Blocks, inputs: Any) -> Any:
    """Multiply by MatMulNBits in ONNX Runtime."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    parts = {"codes": pack_codes(blocks), "scales": blocks.scale.copy()}
    if (zero := pack_zero_points(blocks)) is not None:
        parts["zero_points"] = zero
    height, width = blocks.codes.shape
    node = helper.make_node(
        "MatMulNBits",
        ["x", *parts],
        ["y"],
        domain="com.microsoft",
        K=width,
        N=height,
        bits=blocks.bits,
        block_size=blocks.block,
        accuracy_level=1,
    )
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", height])],
        [numpy_helper.from_array(array, name) for name, array in parts.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": inputs})[0]
