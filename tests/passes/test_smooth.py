"""SmoothQuant: the same function, with activations that 8 bits can hold."""

import pytest
import torch
from families import FAMILIES, Family, random_rows, save_family
from helpers import assert_near, build, open_model, recipe
from llmopt.core.errors import UsageError
from llmopt.core.params import convert
from llmopt.core.passes import PassContext
from llmopt.models.text import batches
from llmopt.passes.gptq import Gptq, GptqParams
from llmopt.passes.numerics.smooth import InputRange, int8_error, smoothing_factors
from llmopt.passes.products import NO_PRODUCER
from llmopt.passes.smooth import Smooth, SmoothParams
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.sweep import run_sweep
from outliers import write_outliers

DECODERS = [name for name, family in FAMILIES.items() if family.is_decoder and family.text]
UNBALANCED = {
    "gpt2": ("mlp.c_proj",),
    "gpt_neox": ("attention.dense", "dense_4h_to_h"),
    "mixtral": (".w1", ".w3"),
    "qwen3_moe": tuple(f"experts.{index}.{end}" for index in range(4) for end in ("gate_proj", "up_proj")),
}
"""The layers whose input nothing takes up a scale for."""


def outputs(model):
    materialized = model.materialize()
    (batch,) = batches(random_rows(4, 24, seed=9), decoder=bool(materialized.config.is_encoder_decoder))
    with torch.no_grad():
        made = materialized(**batch, return_dict=True)
    return next(iter(made.values()))


def swept(folder, work, *passes, rows=None):
    model = open_model(folder, work)
    return model, run_sweep(model, list(passes), rows or random_rows(), PassContext())


@pytest.mark.parametrize("name", DECODERS)
def test_the_function_stays_through_a_whole_run(name, family, text, tmp_path):
    source = family(name)
    made = recipe(source, ("smooth", {}), export=("safetensors", {"format": "plain"}), data=text)
    manifest = build(made, tmp_path / "artifact")
    assert manifest.exports[0].verification.passed
    before, after = open_model(source, tmp_path / "a"), open_model(tmp_path / "artifact", tmp_path / "b")
    expected, got = outputs(before), outputs(after)
    assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    (record,) = manifest.passes
    names = {linear.name for linear in before.facts.linears}
    without = {layer for layer in names if layer.endswith(UNBALANCED.get(name, ()) or "-")}
    assert set(record.changed) == names - without
    assert {tuple(skip) for skip in record.skipped} == {(layer, NO_PRODUCER) for layer in without}
    for layer in record.changed:
        assert not after.checkpoint.read(f"{layer}.weight").equal(before.checkpoint.read(f"{layer}.weight")), layer


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_the_function_of_other_models_stays(name, family, tmp_path):
    before = outputs(open_model(family(name), tmp_path / "a"))
    model, (result,) = swept(family(name), tmp_path / "b", Smooth(SmoothParams()))
    assert_near(outputs(model), before, factor=5)
    assert result.changed
    assert {skip.reason for skip in result.skipped} == {NO_PRODUCER}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_factors_are_the_papers(alpha):
    torch.manual_seed(0)
    largest, weights = torch.rand(12) + 0.1, [torch.randn(5, 12), torch.randn(7, 12)]
    columns = torch.cat(weights).abs().amax(0)
    got = smoothing_factors(largest, weights, torch.arange(12), alpha)
    expected = largest**alpha / columns ** (1 - alpha)
    ratio = got / expected
    assert_near(ratio, ratio[0].expand(12))
    assert_near(got.log().mean(), torch.tensor(0.0))


def test_tied_channels_share_the_largest():
    largest, weights = torch.tensor([1.0, 8.0, 2.0, 4.0]), [torch.tensor([[1.0, 1.0, 4.0, 2.0]])]
    got = smoothing_factors(largest, weights, torch.tensor([0, 1, 0, 1]), 0.5)
    expected = torch.tensor([2.0 / 4.0, 8.0 / 2.0]).sqrt()
    assert_near(got[1] / got[0], expected[1] / expected[0])


def test_dead_channels_are_left_alone():
    largest, weights = torch.tensor([0.0, 1.0, 4.0]), [torch.tensor([[1.0, 0.0, 1.0]])]
    got = smoothing_factors(largest, weights, torch.arange(3), 0.5)
    assert got.tolist() == [1.0, 1.0, 1.0]  # a single live channel is its own mean
    assert smoothing_factors(torch.zeros(3), weights, torch.arange(3), 0.5).tolist() == [1.0] * 3


def test_the_range_of_an_input_is_that_of_all_its_tokens():
    torch.manual_seed(0)
    rows = torch.randn(100, 8)
    seen = InputRange(8, rows=16)
    for part in rows.split(40):
        seen.add(part)
    seen.add(torch.zeros(0, 8))
    assert seen.largest.equal(rows.abs().amax(0))
    assert len(seen.sample()) <= 3 * 16
    assert seen.seen
    assert not InputRange(8).seen


@pytest.mark.parametrize("static", [True, False])
def test_outliers_cost_less_when_they_are_shared(static):
    torch.manual_seed(0)
    inputs, weights = torch.randn(200, 32), [torch.randn(16, 32)]
    inputs[:, 3] *= 60
    largest = inputs.abs().amax(0)
    factors = smoothing_factors(largest, weights, torch.arange(32), 0.5)
    plain = int8_error(inputs, weights, torch.ones(32), largest=largest if static else None)
    smoothed = int8_error(inputs, weights, factors, largest=largest if static else None)
    assert smoothed < plain / 3


def errors(model, rows):
    """Return the int8 error of every product of a model, activations with one static range."""
    found = {}

    class Spy(Smooth):
        def run_block(self, block, linears, context):
            for stage in block.stages():
                seen = {product: InputRange(product.in_features, 64) for product in stage}
                block.collect(stage, lambda product, x, seen=seen: seen[product].add(x))
                for product in stage:
                    weights = [block.weight(linear) for linear in product.linears]
                    ones = torch.ones(product.in_features)
                    got = int8_error(seen[product].sample(), weights, ones, largest=seen[product].largest)
                    found[product.linears[0].name] = got
            return super().run_block(block, linears, context)

    run_sweep(model, [Spy(SmoothParams(ignore=("*",)))], rows, PassContext())
    return found


@pytest.mark.parametrize("alpha", [0.5, "search"])
def test_a_model_with_outlier_channels(alpha, family, tmp_path):
    source, rows = family("llama"), random_rows(8, 32)
    folder = write_outliers(source, tmp_path / "outliers", "norms", every=16)
    plain = open_model(folder, tmp_path / "plain")
    assert_near(outputs(plain), outputs(open_model(source, tmp_path / "source")), factor=5)
    model, (result,) = swept(
        folder, tmp_path / "smooth", Smooth(SmoothParams(alpha=alpha, activations="tensor")), rows=rows
    )
    assert result.metrics["smoothed_products_count"] >= 4
    assert_near(outputs(model), outputs(plain), factor=5)
    before, after = errors(plain, rows), errors(model, rows)
    for name in before:
        if name.endswith(("q_proj", "gate_proj")):
            assert after[name] < before[name] / 4, name


def test_the_search_is_no_worse_than_a_fixed_alpha_or_none(family, tmp_path):
    rows = random_rows(8, 32)
    folder = write_outliers(family("llama"), tmp_path / "outliers", "norms", every=16)
    found = {}
    for alpha in ("search", 0.5, 0.0):
        passes = [Smooth(SmoothParams(alpha=alpha, activations="tensor"))]
        model, _ = swept(folder, tmp_path / str(alpha), *passes, rows=rows)
        found[alpha] = errors(model, rows)
    plain = errors(open_model(folder, tmp_path / "plain"), rows)
    total = {key: sum(value.values()) for key, value in found.items()}
    assert total["search"] <= 1.05 * min(total[0.5], total[0.0], sum(plain.values()))


def test_alpha_is_checked():
    for alpha in (0, 0.5, 1.0, "search"):
        convert({"alpha": alpha}, SmoothParams, where="here")
    for alpha in (-0.1, 1.5, "auto"):
        with pytest.raises(UsageError):
            convert({"alpha": alpha}, SmoothParams, where="here")


def test_an_ignored_layer_is_scaled_along_only_with_one_that_is_not(family, tmp_path):
    source = family("llama")
    model, (result,) = swept(source, tmp_path / "a", Smooth(SmoothParams(ignore=("*.q_proj", "*.o_proj", "*.mlp.*"))))
    assert {name.rpartition(".")[2] for name in result.changed} == {"q_proj", "k_proj", "v_proj"}
    before = outputs(open_model(source, tmp_path / "b"))
    assert_near(outputs(model), before, factor=5)
    layer = "model.layers.0.mlp.up_proj.weight"
    assert model.read(layer).equal(model.checkpoint.read(layer))


def test_a_later_pass_of_the_sweep_sees_the_scales(family, tmp_path):
    """smooth and gptq in one sweep give the codes of gptq on the smoothed model."""
    source, rows = family("llama"), random_rows(8, 32)
    together, _ = swept(source, tmp_path / "a", Smooth(SmoothParams()), Gptq(GptqParams(group_size=32)), rows=rows)
    apart, _ = swept(source, tmp_path / "b", Smooth(SmoothParams()), rows=rows)
    run_sweep(apart, [Gptq(GptqParams(group_size=32))], rows, PassContext())
    plain, _ = swept(source, tmp_path / "c", Gptq(GptqParams(group_size=32)), rows=rows)
    first = [layer for layer in together.quantized if layer.startswith("model.layers.0.")]
    for layer in first:
        assert together.quantized_weight(layer).codes.equal(apart.quantized_weight(layer).codes), layer
        assert not together.quantized_weight(layer).codes.equal(plain.quantized_weight(layer).codes), layer


@pytest.mark.parametrize("name", ["smooth", "fold-norms", "awq"])
def test_nothing_moves_scales_after_rounding(name, family, text, tmp_path):
    params = {"group_size": 32} if name == "awq" else {}
    made = recipe(family("llama"), ("rtn", {"group_size": 32}), (name, params), data=text)
    with pytest.raises(UsageError) as caught:
        make_plan(made)
    assert caught.value.what == f"`{name}` cannot come after `rtn`"
    assert caught.value.hint == f"put `{name}` first"


def test_experts_that_the_checkpoint_stores_in_one_tensor(family, monkeypatch, tmp_path):
    stacked = Family(
        "GraniteMoE",
        "GraniteMoeForCausalLM",
        FAMILIES["mixtral"].config | {"model_type": "granitemoe", "num_local_experts": 4},
    )
    monkeypatch.setitem(FAMILIES, "granitemoe", stacked)
    source = save_family("granitemoe", tmp_path / "source")
    model, (result,) = swept(source, tmp_path / "a", Smooth(SmoothParams()))
    experts = [name for name in result.changed if ".output_linear." in name]
    assert len(experts) == 2 * 4
    for name in ("input_linear", "output_linear"):
        tensor = f"model.layers.0.block_sparse_moe.{name}.weight"
        assert not model.read(tensor).equal(model.checkpoint.read(tensor)), tensor
    assert_near(outputs(model), outputs(open_model(source, tmp_path / "b")), factor=5)
