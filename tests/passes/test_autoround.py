"""AutoRound: what is trained is what is exported, and learning pays."""

import pytest
import torch
from families import random_rows
from helpers import open_model
from hypothesis import given, settings
from llmopt.core.block import Linear
from llmopt.core.passes import PassContext
from llmopt.core.quantized import Grid
from llmopt.passes.autoround import Autoround, AutoroundParams
from llmopt.passes.numerics.autoround import Rounding, learn
from llmopt.passes.numerics.grid import round_to_nearest
from llmopt.pipeline.sweep import run_sweep
from test_grid import DTYPES, weights


@given(drawn=weights())
@settings(max_examples=60, deadline=None)
def test_it_sets_out_from_plain_rounding(drawn):
    w, grid = drawn
    for dtype in DTYPES:
        made, expected = Rounding(w, grid, dtype).quantized(), round_to_nearest(w, grid, dtype)
        assert made.codes.equal(expected.codes)
        assert made.scale.equal(expected.scale)


@given(drawn=weights())
@settings(max_examples=60, deadline=None)
def test_what_is_trained_is_what_is_exported(drawn):
    w, grid = drawn
    for dtype in DTYPES:
        one = Rounding(w, grid, dtype)
        target = torch.randn(w.shape, generator=torch.Generator().manual_seed(1)) * w.abs().mean()
        for _ in range(3):
            (one.weight() - target).square().sum().backward()
            one.step(0.1)
        assert one.weight().equal(one.quantized().dequantize().float())
        offsets, low, high = one.parameters
        assert float(offsets.detach().abs().max()) <= 0.5
        assert all(0.5 <= float(share.detach().min()) <= float(share.detach().max()) <= 1.0 for share in (low, high))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_learning_beats_plain_rounding_on_one_product(symmetric, clip):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(24, 64, generator=generator)
    mixed = torch.randn(64, 64, generator=generator)
    rows = [torch.randn(64, 64, generator=generator) @ mixed for _ in range(4)]
    one = Rounding(w, Grid(bits=2, group_size=16, symmetric=symmetric), torch.float32, clip=clip)
    learnt = learn(
        [one],
        lambda index: (rows[index] @ (one.weight() - w).T).square().mean(),
        batches=4,
        iterations=100,
        at_once=2,
        rate=None,
        generator=generator,
    )
    assert learnt.after < 0.9 * learnt.before
    assert one.moved


def swept(folder, work, rows, seed=0, **params):
    model = open_model(folder, work)
    settings = {"group_size": 32, "bits": 3, "iterations": 8, "batch_size": 2} | params
    (result,) = run_sweep(model, [Autoround(AutoroundParams(**settings))], rows, PassContext(seed=seed))
    return model, result


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "phi3", "t5", "bert", "gemma3", "opt", "gpt_neox", "mixtral", "qwen3_moe"]
)
def test_every_family_learns(name, family, tmp_path):
    model, result = swept(family(name), tmp_path, random_rows(8, 32), iterations=20)
    assert sorted(result.changed) == sorted(model.quantized)
    assert not result.skipped
    assert result.metrics["error_max_ratio"] <= 1
    rounded = [
        model.quantized_weight(layer).codes.equal(round_to_nearest(weight, model.quantized[layer], torch.float32).codes)
        for layer in model.quantized
        if f"{layer}.weight" in model.checkpoint.tensors
        for weight in [model.checkpoint.read(f"{layer}.weight")]
        if weight.shape == model.quantized_weight(layer).shape
    ]
    assert not all(rounded)


def test_the_seed_decides(family, tmp_path):
    rows = [*random_rows(4, 32), *random_rows(4, 31), *random_rows(4, 30)]
    models = [
        swept(family("llama"), tmp_path / str(i), rows, seed, iterations=30, learning_rate=0.02)[0]
        for i, seed in enumerate((0, 0, 1))
    ]
    codes = [[model.quantized_weight(layer).codes for layer in models[0].quantized] for model in models]
    assert all(a.equal(b) for a, b in zip(codes[0], codes[1], strict=True))
    assert not all(a.equal(b) for a, b in zip(codes[0], codes[2], strict=True))


class FakeBlock:
    """A block of two layers, of which the second sees nothing."""

    name, dtype, batches = "block", "float32", 1

    def __init__(self, rows):
        generator = torch.Generator().manual_seed(0)
        self.rows = rows
        self.linears = (Linear("seen", 8, 32), Linear("idle", 8, 32))
        self.weights = {linear: torch.randn(8, 32, generator=generator) for linear in self.linears}
        self.results = {}

    def weight(self, linear):
        return self.weights[linear]

    def mask(self, linear):
        return None

    def quantize(self, linear, weight):
        self.results[linear] = weight

    def output(self, batch, weights=None):
        seen, idle = ((weights or self.weights)[linear] for linear in self.linears)
        return (self.rows @ seen.T + self.rows[:, :, :0] @ idle[:, :0].T)[None, 0]


def run_on(rows, **params):
    block = FakeBlock(rows)
    one = Autoround(AutoroundParams(**({"group_size": 16, "bits": 2, "iterations": 20} | params)))
    return block, one.run_block(block, block.linears, PassContext())


def test_a_layer_that_sees_nothing_is_rounded_to_nearest_and_says_so():
    block, result = run_on(torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(1)))
    idle = block.linears[1]
    assert result.notes == ["idle: no calibration token reaches it; rounded to nearest"]
    assert result.metrics["rounded_to_nearest_count"] == 1
    expected = round_to_nearest(block.weights[idle], Grid(bits=2, group_size=16, symmetric=True), torch.float32)
    assert block.results[idle].codes.equal(expected.codes)


def test_a_block_that_learning_makes_worse_keeps_plain_rounding():
    block, result = run_on(
        torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(1)), iterations=1, learning_rate=9.0
    )
    assert result.notes == ["block: learning did not lessen the error of its output; rounded to nearest"]
    assert result.metrics == {"error_max_ratio": 1.0, "rounded_to_nearest_count": 2}
    for linear in block.linears:
        expected = round_to_nearest(block.weights[linear], Grid(bits=2, group_size=16, symmetric=True), torch.float32)
        assert block.results[linear].codes.equal(expected.codes)


def test_other_weights_are_for_one_call_only(family, tmp_path):
    """The block's own weights stay, gradients reach the given ones, fused and stacked layers included."""
    from llmopt.models.blocks import loaded
    from llmopt.models.outside import outside_on_demand
    from llmopt.models.replay import Replay
    from llmopt.models.text import batches

    for name in ("llama", "phi3", "gpt2", "mixtral"):
        model = open_model(family(name), tmp_path / name)
        skeleton = model.skeleton()
        site = skeleton.sites[0]
        replay = Replay(skeleton, batches(random_rows(4, 24), decoder=False))
        with outside_on_demand(skeleton, model.read), loaded(skeleton, site, model, replay) as block:
            before = block.output(0)
            given = {linear: block.weight(linear).clone().requires_grad_() for linear in block.linears}
            same = block.output(0, given)
            assert torch.allclose(same, before, atol=1e-6)
            same.square().sum().backward()
            assert all(bool(weight.grad.any()) for weight in given.values()), name
            zeros = block.output(0, {linear: torch.zeros_like(weight) for linear, weight in given.items()})
            assert not torch.allclose(zeros, before, atol=1e-3)
            assert block.output(0).equal(before)
