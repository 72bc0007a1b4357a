"""Floating-point and int8 weights in compressed-tensors: packed, read back, and read by its own decompressors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt.core.activations import ActivationGrid, QuantizedInput
from llmopt.core.quantized import Grid, QuantizedWeight
from llmopt.exporters.layouts.compressed_tensors import CompressedTensors, format_of, inputs_args, weights_args
from llmopt.passes.numerics.grid import round_to_nearest

DYNAMIC = QuantizedInput(grid=ActivationGrid(number="int8", scale="token"))
FIXED = QuantizedInput(grid=ActivationGrid(number="int8", scale="tensor", symmetric=False), scale=0.25, zero_point=-7)
KINDS = {
    "channel": Grid(bits=8, group_size="channel", symmetric=True, number="fp8"),
    "tensor": Grid(bits=8, group_size="tensor", symmetric=True, number="fp8"),
    "block": Grid(bits=8, group_size="block", symmetric=True, number="fp8"),
    "nvfp4": Grid(bits=4, group_size=16, symmetric=True, number="nvfp4"),
    "mxfp4": Grid(bits=4, group_size=32, symmetric=True, number="mxfp4"),
    "int8": Grid(bits=8, group_size="channel", symmetric=True),
    "int8 tensor": Grid(bits=8, group_size="tensor", symmetric=True),
    "int4": Grid(bits=4, group_size=32, symmetric=True),
}


@st.composite
def weights(draw):
    """Return a rounded weight whose shape the grid divides, and how its input is rounded."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    grid = KINDS[kind]
    unit = grid.group_size if isinstance(grid.group_size, int) else 128 if kind == "block" else 1
    columns = unit * draw(st.integers(1, 3 if unit > 1 else 50))
    rows = 128 * draw(st.integers(1, 2)) if kind == "block" else draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = 10.0 ** draw(st.integers(-4, 2))
    dtype = torch.bfloat16 if kind in ("nvfp4", "mxfp4") else draw(st.sampled_from([torch.float32, torch.bfloat16]))
    made = round_to_nearest(torch.randn(rows, columns, generator=generator) * spread, grid, dtype)
    return made, draw(st.sampled_from([DYNAMIC, FIXED])) if grid.number == "int" else None


def packed(weight: QuantizedWeight, inputs: QuantizedInput | None) -> dict[str, torch.Tensor]:
    layout, dtype = CompressedTensors(), str(weight.scale.dtype).removeprefix("torch.")
    parts = layout.pack(weight, inputs) | layout.input_parts(inputs, dtype)
    announced = layout.specs(weight.shape, dtype, weight.grid, inputs)
    assert {part: (str(t.dtype), tuple(t.shape)) for part, t in parts.items()} == {
        part: (spec.dtype, spec.shape) for part, spec in announced.items()
    }
    assert all(tensor.is_contiguous() for tensor in parts.values())
    return parts


@given(given_weight=weights())
@settings(max_examples=150, deadline=None)
def test_codes_come_back_and_their_own_reader_gives_our_weight(given_weight):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight, inputs = given_weight
    parts = packed(weight, inputs)
    back = CompressedTensors().unpack(parts, weight.grid, str(weight.scale.dtype).removeprefix("torch."))
    assert back.codes.equal(weight.codes)
    assert back.scale.equal(weight.scale)
    assert back.scale.dtype == weight.scale.dtype
    assert weight.divisor is None or back.divisor.equal(weight.divisor)

    args = QuantizationArgs(**weights_args(weight.grid))
    activations = None if inputs is None else QuantizationArgs(**inputs_args(inputs.grid))
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=activations)
    reader = BaseCompressor.get_value_from_registry(format_of(weight.grid, inputs))
    read = reader.decompress(dict(parts), scheme)["weight"]
    assert read.equal(weight.dequantize(read.dtype))
    assert read.dtype == weight.scale.dtype


def test_fixed_scales_of_inputs_are_stored():
    weight = round_to_nearest(torch.randn(8, 64), KINDS["int8"], torch.bfloat16)
    parts = packed(weight, FIXED)
    assert (parts["input_scale"].tolist(), parts["input_zero_point"].tolist()) == ([0.25], [-7])
    assert parts["input_scale"].dtype is torch.bfloat16
    assert not {"input_scale", "input_zero_point"} & set(packed(weight, DYNAMIC))


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_beside_int8_inputs_are_stored_unpacked(bits):
    grid = Grid(bits=bits, group_size=32, symmetric=True)
    weight = round_to_nearest(torch.randn(8, 64), grid, torch.float32)
    stored = packed(weight, DYNAMIC)["weight"]
    assert stored.dtype is torch.int8
    assert stored.equal((weight.codes.int() - grid.midpoint).to(torch.int8))
