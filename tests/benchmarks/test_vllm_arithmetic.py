"""What the simulation of vLLM's CPU kernels claims of them, where the claim can be computed in another way."""

import math

import pytest
import torch
from vllm_arithmetic import asymmetric_inputs, fp8_cache


def test_int8_beside_4_bit_weights_is_what_torchs_operator_computes():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(9, 96, generator=generator) + 0.3
    values[3] = values[3].abs()  # a token without negative values
    values[4] = 0
    codes = torch.randint(-8, 8, (64, 96), generator=generator)
    scales = torch.rand(64, 3, generator=generator).bfloat16()
    shifted = (codes + 8).to(torch.uint8)
    packed = torch.ops.aten._dyn_quant_pack_4bit_weight(
        shifted[:, 1::2] << 4 | shifted[:, ::2], scales, None, 32, 96, 64
    )
    weight = (codes.reshape(64, 3, 32) * scales.float().unsqueeze(-1)).reshape(64, 96)

    made = torch.ops.aten._dyn_quant_matmul_4bit(values, packed, 32, 96, 64)

    torch.testing.assert_close(asymmetric_inputs(values) @ weight.T, made, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(values @ weight.T, made, atol=1e-2)


@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_the_cache_moves_every_number_toward_zero(scale):
    values = torch.cat([torch.randn(500, generator=torch.Generator().manual_seed(0)) * 50, torch.logspace(-6, 3, 400)])

    made = fp8_cache(values, torch.tensor(scale))

    for value, kept in zip(values.tolist(), made.tolist(), strict=True):
        assert kept == pytest.approx(_truncated(value / scale) * scale, rel=1e-6, abs=1e-9)
    nearest = (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    assert (made.abs() <= nearest.abs() * (1 + 1e-6)).all()
    assert (made.abs() < nearest.abs() * (1 - 1e-3)).any()


def _truncated(value: float) -> float:
    """Cut a number to four significant bits, of steps of 2^-9 and more, up to 448."""
    size = min(abs(value), 448.0)
    step = 2.0 ** max(math.floor(math.log2(size)) - 3, -9)
    return math.copysign(math.floor(size / step) * step, value)
