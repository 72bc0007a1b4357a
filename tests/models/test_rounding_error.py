"""The relative error of a rounded weight, against the whole matrix."""

import pytest
import torch
from helpers import grid, open_model
from llmopt.core.passes import PassContext
from llmopt.core.quantized import Grid
from llmopt.models.rounding_error import rounding_error
from llmopt.passes.awq import Awq, AwqParams
from llmopt.passes.numerics.grid import round_to_nearest
from llmopt.passes.rtn import Rtn, RtnParams
from llmopt.pipeline.sweep import run_sweep

GRIDS = [
    grid(),
    grid(bits=2, group_size="channel", symmetric=False),
    grid(group_size="tensor"),
    Grid(bits=8, group_size="block", symmetric=True, number="fp8"),
    Grid(bits=4, group_size=16, symmetric=True, number="nvfp4"),
    Grid(bits=4, group_size=32, symmetric=True, number="mxfp4"),
]


def naive(weight, rounded):
    return float((rounded.dequantize().double() - weight.double()).norm() / weight.double().norm())


@pytest.mark.parametrize("one", GRIDS, ids=str)
@pytest.mark.parametrize("rows", [128, 384])
def test_a_sample_of_rows_tells_the_error_of_the_matrix(one, rows):
    torch.manual_seed(0)
    weight = torch.randn(rows, 256).bfloat16()
    rounded = round_to_nearest(weight, one, torch.bfloat16)
    asked = []

    def rows_of(strips):
        asked.extend(strips)
        return (weight[strip] for strip in strips)

    assert rounding_error(rounded, rows_of) == pytest.approx(naive(weight, rounded), rel=0.05)
    assert sum(strip.stop - strip.start for strip in asked) <= 128
    assert asked[-1].stop == rows or one.group_size == "block"


def test_a_small_weight_is_looked_at_whole():
    weight = torch.randn(32, 64)
    rounded = round_to_nearest(weight, grid(), torch.float32)
    found = rounding_error(rounded, lambda strips: (weight[strip] for strip in strips))
    assert found == float(f"{naive(weight, rounded):.4g}")


def test_zeros_have_no_error():
    weight = torch.zeros(8, 64)
    rounded = round_to_nearest(weight, grid(), torch.float32)
    assert rounding_error(rounded, lambda strips: (weight[strip] for strip in strips)) == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_rtn_reports_every_layer_it_rounds(name, family, tmp_path):
    """Weights that are read from disk by rows, that are stored transposed, and that lie in a stack of experts."""
    model = open_model(family(name, dtype="bfloat16"), tmp_path)
    (result,) = run_sweep(model, [Rtn(RtnParams(group_size=32))], [], PassContext())
    fresh = open_model(family(name, dtype="bfloat16"), tmp_path / "fresh")
    assert sorted(result.layers) == sorted(result.changed)
    weights = {linear.name: linear for linear in fresh.facts.linears}
    for layer, figures in result.layers.items():
        weight = original(fresh, layer, transposed=layer in model.store.transposed)
        assert figures["relative_error"] == pytest.approx(naive(weight, model.store.get(layer)), rel=0.05), layer
        assert (figures["bits"], figures["bits_per_weight"]) == (4, 4.5)
    assert weights or name == "mixtral"


def original(model, layer, *, transposed):
    if f"{layer}.weight" in model.checkpoint.tensors:
        weight = model.checkpoint.read(f"{layer}.weight")
        return weight.T if transposed else weight
    stack, _, expert = layer.rpartition(".")
    return model.checkpoint.read(stack)[int(expert)]


def test_the_error_is_of_what_the_pass_was_given(family, text, tmp_path):
    """After awq has moved scales into the weights, those are what is rounded."""
    rows = [list(range(3, 35)) for _ in range(4)]
    model = open_model(family("llama"), tmp_path)
    (result,) = run_sweep(model, [Awq(AwqParams(group_size=32))], rows, PassContext())
    assert sorted(result.layers) == sorted(result.changed)
    assert all(0 < figures["relative_error"] < 0.5 for figures in result.layers.values())
