"""AWQ: scales and clipped ranges that lower the error of the outputs, the function unchanged before rounding."""

import pytest
import torch
from families import FAMILIES, random_rows
from helpers import assert_near, build, grid, open_model, recipe
from llmopt.core.errors import UsageError
from llmopt.core.params import Override
from llmopt.core.passes import PassContext
from llmopt.models.text import batches
from llmopt.passes.awq import Awq, AwqParams
from llmopt.passes.gptq import Gptq, GptqParams
from llmopt.passes.numerics.awq import Layer, clip_scales, diagonal_blocks, output_errors, search
from llmopt.passes.numerics.grid import fit_scales, round_to, round_to_nearest
from llmopt.passes.products import NO_PRODUCER
from llmopt.passes.rtn import Rtn, RtnParams
from llmopt.passes.smooth import Smooth, SmoothParams
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.sweep import run_sweep
from outliers import write_outliers

TEXT = [name for name, family in FAMILIES.items() if family.text]
ROWS = random_rows(12, 32)


def outputs(model, rows=None):
    materialized = model.materialize()
    (batch,) = batches(rows or random_rows(8, 48, seed=4), decoder=bool(materialized.config.is_encoder_decoder))
    with torch.no_grad():
        return next(iter(materialized(**batch, return_dict=True).values()))


def swept(folder, work, *passes, rows=None):
    model = open_model(folder, work)
    return model, run_sweep(model, list(passes), rows or ROWS, PassContext())


def awq(**params):
    return Awq(AwqParams(**({"group_size": 32, "ratios": 5} | params)))


def inputs(tokens=300, features=64, outlier=20.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, features, generator=generator)
    rows[:, ::13] *= outlier
    return rows, rows.T @ rows / tokens


def test_errors_by_blocks_are_those_of_each_group_alone():
    rows, hessian = inputs(features=64)
    difference = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    got = output_errors(difference, diagonal_blocks(hessian, grid(group_size=16)))
    for index in range(4):
        columns = slice(16 * index, 16 * index + 16)
        expected = (rows[:, columns] @ difference[:, columns].T).square().mean(0)
        assert_near(got[:, index], expected, factor=10)


@pytest.mark.parametrize(("group_size", "size"), [(16, 16), ("channel", 96), ("tensor", 96), (48, 48)])
def test_blocks_follow_the_groups(group_size, size):
    _, hessian = inputs(features=192)
    blocks = diagonal_blocks(hessian, grid(group_size=group_size))
    assert blocks.shape == (192 // size, size, size)
    assert blocks[1].equal(hessian[size : 2 * size, size : 2 * size])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, "channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 4])
def test_clipping_lowers_the_error_of_every_group(bits, group_size, symmetric):
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    _, hessian = inputs()
    chosen = grid(bits, group_size, symmetric)
    blocks = diagonal_blocks(hessian, chosen)

    def error(scales):
        return output_errors(scales.weight(round_to(weight, scales)).dequantize() - weight, blocks)

    clipped, whole = (
        error(clip_scales(weight, blocks, chosen, torch.float32)),
        error(fit_scales(weight, chosen, torch.float32)),
    )
    if group_size != 16:
        clipped, whole = clipped.sum(-1), whole.sum(-1)
    if group_size == "tensor":
        clipped, whole = clipped.sum(), whole.sum()
    assert bool((clipped <= whole * (1 + 1e-4)).all())
    assert float(clipped.sum()) < float(whole.sum())


def test_the_search_tells_the_error_of_what_it_found():
    rows, hessian = inputs()
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    chosen = grid(3, 16)
    found = search([Layer(weight, chosen)], hessian, torch.arange(64), torch.float32, steps=10)
    assert [one.error for one in found] == sorted(one.error for one in found)
    power = (rows @ weight.T).square().mean(0).sum()
    plain = next(one for one in found if bool((one.factors == 1).all()))
    assert found[0].error < 0.8 * plain.error
    for one in (found[0], plain):
        rounded = round_to_nearest(weight * one.factors, chosen, torch.float32).dequantize() / one.factors
        expected = (rows @ (rounded - weight).T).square().mean(0).sum() / power
        assert one.error == pytest.approx(float(expected), rel=1e-3)


def test_tied_channels_take_one_factor():
    _, hessian = inputs()
    channels = torch.arange(64) % 32
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    for one in search([Layer(weight, grid(3, 16))], hessian, channels, torch.float32, steps=4):
        assert one.factors.shape == (32,)
        assert bool(torch.isfinite(one.factors).all())
        assert float(one.factors.min()) > 0


def test_inputs_that_are_always_zero_are_no_trouble():
    _, hessian = inputs()
    hessian[:4], hessian[:, :4] = 0, 0
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    for matrix in (hessian, torch.zeros_like(hessian)):
        found = search([Layer(weight, grid(3, 16))], matrix, torch.arange(64), torch.float32, steps=4)
        assert bool(torch.isfinite(found[0].factors).all())


@pytest.mark.parametrize("name", TEXT)
def test_scales_alone_leave_the_function_as_it_was(name, family, tmp_path):
    model, (result,) = swept(family(name), tmp_path / "a", awq(scales_only=True, bits=2))
    before = outputs(open_model(family(name), tmp_path / "b"))
    assert_near(outputs(model), before, factor=5)
    assert not model.quantized
    assert result.changed
    assert not {skip.name for skip in result.skipped} & set(result.changed)
    assert {skip.reason for skip in result.skipped} <= {NO_PRODUCER}


@pytest.mark.parametrize("name", TEXT)
def test_every_layer_is_quantized(name, family, tmp_path):
    model, (result,) = swept(family(name), tmp_path, awq())
    assert sorted(result.changed) == sorted(model.quantized) == sorted(linear.name for linear in model.facts.linears)
    assert result.skipped == []
    assert result.metrics["scaled_inputs_count"] > 0


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_outputs_are_nearer_than_with_rounding_to_nearest(bits, symmetric, family, tmp_path):
    folder = write_outliers(family("llama"), tmp_path / "outliers", "norms", factor=4.0, every=16)
    rows = random_rows(24, 48, seed=3)
    params = {"bits": bits, "group_size": 32, "symmetric": symmetric}
    expected = outputs(open_model(folder, tmp_path / "float"))
    errors = []
    for index, one in enumerate((awq(**params), Rtn(RtnParams(**params)))):
        model, _ = swept(folder, tmp_path / str(index), one, rows=rows)
        errors.append(float((outputs(model) - expected).square().mean()))
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("follower", [Gptq(GptqParams(group_size=32)), Rtn(RtnParams(group_size=32))])
def test_scales_then_another_way_to_round(follower, family, tmp_path):
    """In one sweep as in two: a pass sees what the one before it made."""
    together, _ = swept(family("llama"), tmp_path / "a", awq(scales_only=True), follower)
    apart, _ = swept(family("llama"), tmp_path / "b", awq(scales_only=True))
    run_sweep(apart, [follower], ROWS, PassContext())
    assert sorted(together.quantized) == sorted(linear.name for linear in together.facts.linears)
    for layer in [layer for layer in together.quantized if layer.startswith("model.layers.0.")]:
        assert together.quantized_weight(layer).codes.equal(apart.quantized_weight(layer).codes), layer


def test_smooth_before_awq(family, tmp_path):
    model, results = swept(family("llama"), tmp_path / "a", Smooth(SmoothParams()), awq(bits=8))
    expected = outputs(open_model(family("llama"), tmp_path / "b"))
    assert [bool(result.changed) for result in results] == [True, True]
    assert float((outputs(model) - expected).abs().max()) < 0.05 * float(expected.abs().max())


@pytest.mark.parametrize("trials", [1, 3])
def test_trials_by_the_block_change_nothing_but_the_choice(trials, family, tmp_path):
    model, (result,) = swept(family("llama"), tmp_path / "a", awq(trials=trials, scales_only=True))
    assert result.metrics["scaled_inputs_count"] == 8
    assert not model.quantized
    assert_near(outputs(model), outputs(open_model(family("llama"), tmp_path / "b")), factor=5)
    one, _ = swept(family("llama"), tmp_path / "c", awq(trials=1, scales_only=True))
    none, _ = swept(family("llama"), tmp_path / "d", awq(trials=0, scales_only=True))
    for name in one.store.changed:
        assert one.read(name).equal(none.read(name)), name


def test_a_whole_run(family, text, tmp_path):
    made = recipe(
        family("qwen2"), ("awq", {"group_size": 32, "scales_only": True}), ("gptq", {"group_size": 32}), data=text
    )
    manifest = build(made, tmp_path / "artifact")
    assert manifest.exports[0].verification.passed
    assert manifest.exports[0].verification.weights_equal
    assert [record.name for record in manifest.passes] == ["awq", "gptq"]


def test_rounding_twice_is_refused(family, text):
    for second in ("gptq", "rtn", "awq", "smooth"):
        params = {} if second == "smooth" else {"group_size": 32}
        with pytest.raises(UsageError) as caught:
            make_plan(recipe(family("llama"), ("awq", {"group_size": 32}), (second, params), data=text))
        assert "cannot come after `awq`" in caught.value.what
        assert caught.value.hint
    make_plan(
        recipe(
            family("llama"), ("awq", {"group_size": 32, "scales_only": True}), ("rtn", {"group_size": 32}), data=text
        )
    )


def test_overrides_and_ignored_layers(family, tmp_path):
    one = awq(bits=8, ignore=("*.q_proj", "*.layers.1.*"), overrides=(Override(pattern="*.down_proj", bits=6),))
    model, (result,) = swept(family("llama"), tmp_path / "a", one)
    assert "model.layers.0.self_attn.q_proj" not in model.quantized
    assert model.quantized["model.layers.0.mlp.down_proj"].bits == 6
    assert model.quantized["model.layers.0.mlp.up_proj"].bits == 8
    assert not [layer for layer in model.quantized if ".layers.1." in layer]
    assert sorted(result.changed) == sorted(model.quantized)
    expected = outputs(open_model(family("llama"), tmp_path / "b"))
    assert float((outputs(model) - expected).abs().mean()) < 0.05 * float(expected.abs().mean())


def test_an_expert_without_tokens_is_rounded_to_nearest_and_says_so(family, tmp_path):
    model, (result,) = swept(family("mixtral", num_local_experts=16), tmp_path, awq(), rows=random_rows(1, 3))
    idle = [note for note in result.notes if "no calibration token reaches it; rounded to nearest" in note]
    assert idle
    assert result.metrics["rounded_to_nearest_count"] == len(idle)
    assert sorted(model.quantized) == sorted(linear.name for linear in model.facts.linears)


def test_without_clip_it_needs_no_second_look_at_the_samples(family, tmp_path):
    model, (result,) = swept(family("llama"), tmp_path, awq(clip="none"))
    layer = "model.layers.1.mlp.down_proj"
    assert len(result.changed) == 14
    factors = model.read("model.layers.1.mlp.up_proj.weight")
    assert bool(torch.isfinite(factors).all())
    assert model.quantized_weight(layer).codes.shape == (64, 96)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_same_codes_twice(name, family, tmp_path):
    first, _ = swept(family(name), tmp_path / "first", awq(trials=2))
    second, _ = swept(family(name), tmp_path / "second", awq(trials=2))
    for layer in first.quantized:
        assert first.quantized_weight(layer).codes.equal(second.quantized_weight(layer).codes)
