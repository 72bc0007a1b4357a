"""The quantized weight: what it is, and what it refuses to be."""

import pytest
import torch
from helpers import grid
from hypothesis import given
from hypothesis import strategies as st
from llmopt.core.quantized import BITS, Grid, QuantizedWeight


def codes(rows=4, columns=8, bits=4):
    return torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)


@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 7),
    groups=st.integers(1, 3),
    width=st.integers(1, 9),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_dequantize_is_the_formula(bits, rows, groups, width, symmetric, dtype, seed):
    torch.manual_seed(seed)
    made = QuantizedWeight(
        codes=codes(rows, groups * width, bits),
        scale=(torch.rand(rows, groups) + 0.01).to(dtype),
        zero_point=None if symmetric else codes(rows, groups, bits),
        grid=Grid(bits=bits, group_size=width, symmetric=symmetric),
    )
    before = made.codes.clone()
    got, exact = made.dequantize(), made.dequantize(torch.float32)
    assert (got.dtype, exact.dtype) == (dtype, torch.float32)
    for row in range(rows):
        for column in range(groups * width):
            group = column // width
            zero = 1 << (bits - 1) if symmetric else int(made.zero_point[row, group])
            value = (torch.tensor(int(before[row, column]) - zero).float() * made.scale[row, group].float()).item()
            assert exact[row, column].item() == value
    assert got.equal(exact.to(dtype))
    assert made.codes.equal(before)  # nothing was written into


@pytest.mark.parametrize(("size", "shape"), [("channel", (4, 1)), ("tensor", (1, 1)), (2, (4, 4)), (8, (4, 1))])
def test_scale_has_a_place_for_every_group(size, shape):
    made = QuantizedWeight(codes(), torch.ones(shape), None, grid(4, size))
    assert made.shape == (4, 8)
    assert made.dequantize().shape == (4, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": grid(7, 4)}, "bits must be one of"),
        ({"codes": codes().int()}, "uint8 matrix"),
        ({"codes": codes().flatten()}, "uint8 matrix"),
        ({"grid": grid(4, 3)}, "not a multiple of the group size"),
        ({"scale": torch.ones(4, 1)}, r"scale must be \(4, 2\)"),
        ({"grid": grid(4, 4, symmetric=False)}, "no zero point"),
        ({"zero_point": torch.zeros(4, 2, dtype=torch.uint8)}, "no zero point"),
        (
            {"zero_point": torch.zeros(4, 1, dtype=torch.uint8), "grid": grid(4, 4, symmetric=False)},
            "zero point must be shaped like scale",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes, message):
    parts = {"codes": codes(), "scale": torch.ones(4, 2), "zero_point": None, "grid": grid(4, 4)} | changes
    with pytest.raises(ValueError, match=message):
        QuantizedWeight(**parts)


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (grid(4, 128), "int4 group 128 symmetric"),
        (grid(8, "channel", symmetric=False), "int8 channel asymmetric"),
        (grid(3, "tensor"), "int3 tensor symmetric"),
    ],
)
def test_a_grid_reads_as_people_write_it(made, text):
    assert str(made) == text


@pytest.mark.parametrize("bits", BITS)
def test_levels_and_midpoint(bits):
    assert grid(bits).levels == 2**bits
    assert grid(bits).midpoint == 2 ** (bits - 1)


def test_bits_per_weight_counts_scales_and_zero_points():
    assert grid(4, 32).bits_per_weight(64, 128) == 4 + 16 / 32
    assert grid(4, 32, symmetric=False).bits_per_weight(64, 128) == 4 + 20 / 32
    assert grid(8, "channel").bits_per_weight(64, 128, scale_bits=32) == 8 + 32 / 128
    assert grid(2, "tensor").bits_per_weight(64, 128) == 2 + 16 / (64 * 128)


def test_bytes_at_rest():
    made = QuantizedWeight(codes(4, 8, 3), torch.ones(4, 2, dtype=torch.bfloat16), None, grid(3, 4))
    assert made.nbytes == 4 * 8 * 3 // 8 + 4 * 2 * 2
