"""Packing, against compressed-tensors' own reader."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt.core.quantized import BITS, Grid, QuantizedWeight
from llmopt.exporters.layouts.compressed_tensors import CompressedTensors, weights_args
from llmopt.exporters.packing import pack_int32, unpack_int32

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def quantized(draw):
    """Return a random quantized weight; shapes need not be even."""
    size = draw(st.sampled_from([1, 3, 4, 32, "channel", "tensor"]))
    symmetric = draw(st.booleans()) or size == "tensor"  # compressed-tensors packs no asymmetric tensor
    columns = draw(st.integers(1, 4)) * size if isinstance(size, int) else draw(st.integers(1, 70))
    rows, bits = draw(st.integers(1, 40)), draw(st.sampled_from(BITS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    grid = Grid(bits=bits, group_size=size, symmetric=symmetric)
    shape = (1, 1) if size == "tensor" else (rows, columns // grid.group_width(columns))
    scale = torch.rand(shape, generator=generator).add(0.01).to(draw(st.sampled_from(DTYPES)))
    codes = torch.randint(0, grid.levels, (rows, columns), generator=generator).to(torch.uint8)
    zero = None if symmetric else torch.randint(0, grid.levels, shape, generator=generator).to(torch.uint8)
    return QuantizedWeight(codes=codes, scale=scale, zero_point=zero, grid=grid)


@given(rows=st.integers(1, 9), columns=st.integers(1, 70), bits=st.integers(1, 8), seed=st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_unpacking_undoes_packing(rows, columns, bits, seed):
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_int32(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, -(-columns * bits // 32))
    assert unpack_int32(packed, bits, columns).equal(codes)


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_a_stream_of_bits_lowest_first(bits):
    torch.manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (1, 40), dtype=torch.uint8)
    number = sum(int(code) << (bits * index) for index, code in enumerate(codes[0]))
    words = [(number >> (32 * index)) & 0xFFFFFFFF for index in range(-(-40 * bits // 32))]
    assert [int(word) & 0xFFFFFFFF for word in pack_int32(codes, bits)[0]] == words


@pytest.mark.parametrize("bits", BITS)
def test_a_view_is_packed_as_its_copy(bits):
    codes = torch.randint(0, 1 << bits, (12, 40), dtype=torch.uint8)
    assert pack_int32(codes.T, bits).equal(pack_int32(codes.T.contiguous(), bits))
    packed = pack_int32(codes, bits)
    wide = torch.stack([packed, packed], -1)[..., 0]
    assert unpack_int32(wide, bits, 40).equal(codes)


@given(weight=quantized())
@settings(max_examples=200, deadline=None)
def test_compressed_tensors_reads_our_weight_bit_for_bit(weight):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    parts = CompressedTensors().pack(weight)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights_args(weight.grid)))
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    got = compressor.decompress(parts, scheme)["weight"]
    assert got.dtype == weight.scale.dtype
    assert got.equal(weight.dequantize())


@given(weight=quantized())
@settings(max_examples=100, deadline=None)
def test_what_is_packed_is_as_announced_and_comes_back(weight):
    layout = CompressedTensors()
    parts = layout.pack(weight)
    dtype = str(weight.scale.dtype).removeprefix("torch.")
    announced = layout.specs(weight.shape, dtype, weight.grid)
    assert {part: (str(t.dtype), tuple(t.shape)) for part, t in parts.items()} == {
        part: (spec.dtype, spec.shape) for part, spec in announced.items()
    }
    back = layout.unpack(parts, weight.grid, str(weight.scale.dtype).removeprefix("torch."))
    assert back.codes.equal(weight.codes)
    assert back.scale.equal(weight.scale)
    assert (back.zero_point is None) == (weight.zero_point is None)
    assert weight.zero_point is None or back.zero_point.equal(weight.zero_point)
