"""What rounding took, as an adapter beside the rounded weights: found block by block, in the sweep that rounds."""

import json

import pytest
import torch
import transformers
from families import random_rows
from helpers import build, recipe, refused_plan
from llmopt.core.errors import LlmoptError
from llmopt.passes.numerics.low_rank import factors
from llmopt.pipeline.plan import make_plan
from peft import PeftModel
from safetensors.torch import load_file

RTN = ("rtn", {"bits": 2, "group_size": 32})
GPTQ = ("gptq", {"bits": 2, "group_size": 32})
PLAIN = ("safetensors", {"format": "plain"})
WHOLE = {"rank": 96, "weighting": "none"}


def extract(**params):
    return ("extract-adapter", params)


def added(folder, layer):
    """Return the matrix that an artifact's adapter adds to a layer's weight, (out_features, in_features)."""
    parts = load_file(folder / "adapter" / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    down, up = (parts[f"base_model.model.{layer}.lora_{one}.weight"] for one in "AB")
    return config["lora_alpha"] / config["r"] * up @ down


def layers_of(folder):
    names = load_file(folder / "adapter" / "adapter_model.safetensors")
    return [name.split(".", 2)[2].removesuffix(".lora_A.weight") for name in names if name.endswith("lora_A.weight")]


@pytest.mark.parametrize("rounds", [RTN, GPTQ], ids=["rtn", "gptq"])
@pytest.mark.parametrize(
    "before", [[], [("smooth", {})], [("sparsify", {"pattern": "2:4"})]], ids=["", "smooth", "2:4"]
)
@pytest.mark.parametrize(("name", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float32")])
def test_at_full_rank_the_weights_before_rounding_are_back(family, text, tmp_path, name, dtype, before, rounds):
    """Just before: what earlier passes of the sweep made of them, not what the checkpoint holds."""
    base = family(name, dtype=dtype)
    build(recipe(base, *before, export=PLAIN, data=text), tmp_path / "before")
    made = build(recipe(base, *before, rounds, extract(**WHOLE), export=PLAIN, data=text), tmp_path / "out")
    assert made.exports[0].adapted.passed
    assert made.exports[0].adapted.weights_equal
    expected, base_weights = (load_file(tmp_path / one / "model.safetensors") for one in ("before", "out"))
    layers = layers_of(tmp_path / "out")
    assert len(layers) == (14 if name == "llama" else 8)
    first = [layer for layer in layers if ".0." in layer]  # what later blocks were calibrated on is near, not the same
    for layer in first if before else layers:
        turned = name == "gpt2"
        key = next(one for one in expected if one.endswith(f"{layer.removeprefix('transformer.')}.weight"))
        difference = expected[key].float() - base_weights[key].float()
        assert difference.norm() > 0
        got = added(tmp_path / "out", layer)
        assert torch.allclose(got.T if turned else got, difference, atol=2e-5 * float(expected[key].abs().max())), layer


def test_without_data_it_is_the_truncated_difference_and_the_base_stays(family, tmp_path):
    base = family("llama")
    build(recipe(base, RTN, export=PLAIN), tmp_path / "base")
    made = build(recipe(base, RTN, extract(rank=5, weighting="none"), export=PLAIN), tmp_path / "out")
    original, rounded, beside = (
        load_file(one / "model.safetensors") for one in (base, tmp_path / "base", tmp_path / "out")
    )
    assert all(torch.equal(rounded[name], beside[name]) for name in rounded)
    record = made.passes[1]
    assert (record.changed, record.skipped) == ([], [])
    for layer in layers_of(tmp_path / "out"):
        lost = original[f"{layer}.weight"] - rounded[f"{layer}.weight"]
        up, down = factors(lost, 5)
        assert torch.allclose(added(tmp_path / "out", layer), up @ down, atol=1e-6)
        left = float(torch.linalg.svdvals(lost)[5:].norm() / original[f"{layer}.weight"].norm())
        assert record.layers[layer]["with_adapter"] == pytest.approx(left, rel=1e-3)
    assert record.metrics["adapted_layers_count"] == 14
    assert record.metrics["adapter_rank_max_count"] == 5


@pytest.mark.parametrize("weighting", ["covariance", "none"])
def test_base_and_adapter_answer_nearer_to_the_model(family, text, tmp_path, weighting):
    """Also with peft, from the packed artifact, than the base alone; both errors are the manifest's too."""
    base = family("llama")
    made = build(recipe(base, GPTQ, extract(rank=16, weighting=weighting), data=text), tmp_path / "out")
    assert made.exports[0].adapted.passed
    record = made.passes[1]
    assert record.metrics["error_with_adapter_max_ratio"] < record.metrics["error_without_adapter_max_ratio"]
    assert all(one["with_adapter"] < one["without_adapter"] for one in record.layers.values())
    dequantized = transformers.CompressedTensorsConfig(dequantize=True)
    rounded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=dequantized)
    ids = torch.tensor(random_rows(8, 16))
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(base)(ids).logits
        before = float((rounded(ids).logits - expected).square().mean())
        beside = PeftModel.from_pretrained(rounded, tmp_path / "out" / "adapter")
        assert float((beside(ids).logits - expected).square().mean()) < 0.8 * before


def test_the_products_that_calibration_shows_are_what_is_won_back(family, text, tmp_path):
    """Of the first layers, whose inputs nothing has changed: less error than the plain difference of the same rank."""
    base = family("llama")
    errors = {}
    for weighting in ("covariance", "none"):
        made = recipe(base, RTN, extract(rank=4, weighting=weighting), export=PLAIN, data=text)
        build(made, tmp_path / weighting)
        errors[weighting] = added(tmp_path / weighting, "model.layers.0.self_attn.q_proj")
    original, rounded = (load_file(one / "model.safetensors") for one in (base, tmp_path / "none"))
    lost = original["model.layers.0.self_attn.q_proj.weight"] - rounded["model.layers.0.self_attn.q_proj.weight"]
    inputs = []
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    ids = transformers.AutoTokenizer.from_pretrained(base)(text.read_text()[:2000], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        model(ids[:, :128])
    left = {name: float((inputs[0] @ (lost - error).T).norm()) for name, error in errors.items()}
    assert left["covariance"] < 0.97 * left["none"]


def test_only_the_targets_and_what_is_rounded(family, text, tmp_path):
    rounds = ("gptq", {**GPTQ[1], "ignore": ["model.layers.1.*"]})
    made = build(
        recipe(family("llama"), rounds, extract(targets=["q_proj", "mlp.down_proj"]), data=text), tmp_path / "out"
    )
    assert sorted(layers_of(tmp_path / "out")) == ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    reasons = dict(made.passes[1].skipped)
    assert reasons["model.layers.0.self_attn.v_proj"] == "not among the targets"
    assert reasons["model.layers.1.mlp.down_proj"] == "its weight stays in floating point"


def test_experts_have_none(family, text, tmp_path):
    made = build(recipe(family("mixtral"), RTN, extract(rank=2), data=text), tmp_path / "out")
    assert len(layers_of(tmp_path / "out")) == 8
    reasons = {reason for name, reason in made.passes[1].skipped if ".experts." in name}
    assert reasons == {"it is no linear module of its own"}
    with pytest.raises(LlmoptError, match="no layer takes an adapter") as caught:
        build(recipe(family("mixtral"), RTN, extract(targets=["w1"]), data=text), tmp_path / "other")
    assert "it is no linear module of its own" in caught.value.where


LEARN = {"steps": 12, "batch_size": 4, "length": 16, "held_out": 8, "lora_rank": 4}


def test_learning_goes_on_from_it(family, text, tmp_path):
    """The untrained student is base and adapter as they were found; learning makes it better."""
    learn = {"data": str(text), **LEARN, "learning_rate": 3e-3, "steps": 40}
    found = build(recipe(family("llama"), GPTQ, extract(rank=4), ("distill", learn), data=text), tmp_path / "both")
    alone = build(recipe(family("llama"), GPTQ, ("distill", learn), data=text), tmp_path / "alone")
    figures = [made.passes[-1].metrics for made in (found, alone)]
    assert figures[0]["held_out_kl_before_nats"] < 0.9 * figures[1]["held_out_kl_before_nats"]
    assert figures[0]["held_out_kl_after_nats"] < 0.95 * figures[0]["held_out_kl_before_nats"]
    assert found.exports[0].adapted.passed
    assert len(layers_of(tmp_path / "both")) == 14
    still = {**learn, "learning_rate": 1e-12, "lora_alpha": 3}
    build(recipe(family("llama"), GPTQ, extract(rank=4, targets=["q_proj"]), data=text), tmp_path / "found")
    still |= {"lora_targets": ["q_proj"]}
    build(
        recipe(family("llama"), GPTQ, extract(rank=4, targets=["q_proj"]), ("distill", still), data=text),
        tmp_path / "still",
    )
    assert layers_of(tmp_path / "still") == layers_of(tmp_path / "found")
    for layer in layers_of(tmp_path / "found"):
        assert torch.allclose(added(tmp_path / "still", layer), added(tmp_path / "found", layer), atol=1e-6)


def test_the_plan_counts_it(family, text, tmp_path):
    made = recipe(family("llama"), RTN, extract(rank=32, weighting="none"))
    without = make_plan(recipe(family("llama"), RTN)).output_bytes
    plan = make_plan(made)
    build(made, tmp_path / "out")
    adapter = (tmp_path / "out" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert plan.output_bytes - without == pytest.approx(adapter, rel=0.05)
    learnt = recipe(family("llama"), RTN, ("distill", {"data": str(text), **LEARN, "lora_rank": 32}))
    assert make_plan(learnt).output_bytes == plan.output_bytes
    few = make_plan(recipe(family("llama"), RTN, extract(rank=32, weighting="none", targets=["q_proj"]))).output_bytes
    assert few - without == 2 * 32 * 4 * (64 + 64)


class TestRefusals:
    @pytest.mark.parametrize(
        "before",
        [[], [("smooth", {})], [RTN, ("distill", {"steps": 2})], [RTN, ("prune-depth", {"layers": 1})]],
        ids=["nothing", "smooth", "distill", "survey"],
    )
    def test_nothing_before_it_rounds(self, family, text, before):
        words = refused_plan(recipe(family("llama"), *before, extract(), data=text))
        assert "no pass right before it rounds" in words or "cannot come after `rtn`" in words

    @pytest.mark.parametrize("before", [extract(), ("quantize-kv", {}), ("quantize-activations", {})])
    def test_what_it_cannot_follow(self, family, text, before):
        rounds = ("rtn", {"bits": 8, "group_size": "channel"})
        words = refused_plan(recipe(family("llama"), rounds, before, extract(), data=text))
        assert f"`extract-adapter` cannot come after `{before[0]}`" in words

    @pytest.mark.parametrize("later", [("quantize-kv", {}), ("quantize-activations", {})])
    def test_what_cannot_follow_it(self, family, text, later):
        words = refused_plan(recipe(family("llama"), RTN, extract(), later, data=text))
        assert f"`{later[0]}` cannot come after `extract-adapter`" in words

    def test_an_export_without_a_place_for_it(self, family, text):
        assert "cannot hold an adapter" in refused_plan(
            recipe(family("llama"), RTN, extract(), export=("onnx", {}), data=text)
        )

    @pytest.mark.parametrize("learn", [{"lora_rank": 8}, {"lora_targets": ["q_proj"]}])
    def test_learning_of_another_shape(self, family, text, learn):
        made = recipe(family("llama"), RTN, extract(rank=4), ("distill", {**LEARN, **learn}), data=text)
        words = refused_plan(made)
        assert "cannot go on from the adapter of `extract-adapter`" in words
        assert "rank 4 over all layers" in words

    def test_learning_of_the_weights(self, family, text):
        made = recipe(family("llama"), RTN, extract(rank=4), ("distill", {"steps": 2}), data=text)
        assert "leaves an adapter beside the weights" in refused_plan(made)

    def test_no_calibration_data(self, family):
        assert "needs calibration data" in refused_plan(recipe(family("llama"), RTN, extract()))

    def test_a_target_that_is_none(self, family, text):
        words = refused_plan(recipe(family("llama"), RTN, extract(targets=["query"]), data=text))
        assert "target `query` matches no layer" in words
        assert "q_proj" in words
