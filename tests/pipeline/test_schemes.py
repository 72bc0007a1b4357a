"""Schemes with rounded activations or floating-point weights, from the recipe to transformers."""

from __future__ import annotations

import json

import onnx_ir
import pytest
from families import random_rows
from helpers import build, open_model, recipe
from llmopt.core.errors import UsageError
from llmopt.core.passes import PassContext
from llmopt.models.reference import reference_outputs
from llmopt.models.text import batches
from llmopt.passes.gptq import Gptq, GptqParams
from llmopt.passes.quantize_activations import QuantizeActivations, QuantizeActivationsParams
from llmopt.passes.quantize_kv import QuantizeKv, QuantizeKvParams
from llmopt.passes.rtn import Rtn, RtnParams
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.sweep import run_sweep
from safetensors.torch import load_file

FP8 = {"rtn": {"number": "fp8"}}
SHIFTED = {"quantize-activations": {"scale": "tensor", "symmetric": False, "observer": "minmax"}}
INT8 = {"rtn": {"bits": 8, "group_size": "channel"}}
TOKEN = {"quantize-activations": {}}
FIXED = {"quantize-activations": {"scale": "tensor"}}


def steps(*passes: dict) -> list[tuple[str, dict]]:
    return [(name, params) for one in passes for name, params in one.items()]


def made(family, text, tmp_path, *passes, name="llama", **changes):
    """Run a recipe; return the manifest, config.json's quantization_config and the tensors."""
    floating = any(params.get("number") in ("nvfp4", "mxfp4") for one in passes for params in one.values())
    folder = family(name, dtype="bfloat16" if floating else "float32", **changes)
    one = recipe(folder, *steps(*passes), data=text)
    manifest = build(one, tmp_path / "made")
    config = json.loads((tmp_path / "made" / "config.json").read_text(encoding="utf-8"))
    return manifest, config["quantization_config"], load_file(tmp_path / "made" / "model.safetensors")


@pytest.mark.parametrize(
    ("passes", "form"),
    [
        ((INT8, TOKEN), "int-quantized"),
        ((INT8, FIXED), "int-quantized"),
        (
            (INT8, SHIFTED),
            "int-quantized",
        ),
        ((FP8, {"quantize-activations": {"number": "fp8"}}), "float-quantized"),
        (
            (FP8, {"quantize-activations": {"number": "fp8", "scale": "tensor"}}),
            "float-quantized",
        ),
        ((FP8,), "float-quantized"),
        (({"rtn": {"bits": 4, "group_size": 32}}, TOKEN), "int-quantized"),
        (({"rtn": {"bits": 4, "group_size": 32}}, {"quantize-activations": {"number": "fp8"}}), "pack-quantized"),
        (({"rtn": {"number": "nvfp4"}},), "nvfp4-pack-quantized"),
        (({"gptq": {"number": "nvfp4"}},), "nvfp4-pack-quantized"),
        (({"gptq": {"number": "mxfp4"}},), "mxfp4-pack-quantized"),
        (({"smooth": {}}, {"gptq": {"bits": 8, "group_size": "channel"}}, FIXED), "int-quantized"),
    ],
)
def test_transformers_computes_what_we_do(family, text, tmp_path, passes, form):
    manifest, config, _ = made(family, text, tmp_path, *passes)
    assert config["format"] == form
    parity = manifest.exports[0].verification
    assert parity.passed
    assert parity.weights_equal
    assert parity.max_difference < 1e-3


@pytest.mark.parametrize("passes", [(INT8, TOKEN), (INT8, FIXED), ({"rtn": {"bits": 4, "group_size": 32}}, TOKEN)])
def test_in_half_precision_the_reader_may_round_some_activations_the_other_way(family, text, tmp_path, passes):
    manifest = build(recipe(family("llama", dtype="bfloat16"), *steps(*passes), data=text), tmp_path / "made")
    parity = manifest.exports[0].verification
    assert parity.weights_equal
    assert parity.mean_kl < 0.01


@pytest.mark.parametrize(
    ("group_size", "dtype", "told"), [(32, "float32", True), (32, "bfloat16", False), ("channel", "float32", False)]
)
def test_a_note_tells_when_vllm_rounds_the_scales_of_groups(family, text, tmp_path, group_size, dtype, told):
    one = recipe(family("llama", dtype=dtype), *steps({"rtn": {"bits": 4, "group_size": group_size}}, TOKEN), data=text)
    notes = build(one, tmp_path / "made").exports[0].notes
    assert any("bfloat16" in note and "vLLM" in note for note in notes) == told


def test_blocks_of_128_by_128(family, text, tmp_path):
    manifest, config, tensors = made(
        family,
        text,
        tmp_path,
        {"rtn": {"number": "fp8", "group_size": "block"}},
        {"quantize-activations": {"number": "fp8"}},
        hidden_size=256,
        intermediate_size=384,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
    )
    assert config["config_groups"]["group_0"]["weights"]["block_structure"] == [128, 128]
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].shape == (2, 3)
    assert manifest.exports[0].verification.weights_equal
    assert manifest.exports[0].verification.max_difference < 1e-3


def test_several_kinds_of_numbers_in_one_checkpoint(family, text, tmp_path):
    overrides = [
        {"pattern": "*.down_proj", "number": "fp8"},
        {"pattern": "*.o_proj", "bits": 8, "group_size": "channel"},
        {"pattern": "*.0.*.k_proj", "number": "mxfp4"},
        {"pattern": "*.0.*.v_proj", "number": "nvfp4"},
    ]
    manifest, config, _ = made(
        family, text, tmp_path, {"cast": {"dtype": "bfloat16"}}, {"rtn": {"group_size": 32, "overrides": overrides}}
    )
    assert config["format"] == "mixed-precision"
    formats = {group["format"] for group in config["config_groups"].values()}
    assert formats == {"pack-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"}
    assert manifest.exports[0].verification.weights_equal
    assert manifest.exports[0].verification.passed


@pytest.mark.parametrize("number", ["fp8", "int8"])
def test_keys_and_values_are_rounded_there_too(family, text, tmp_path, number):
    manifest, config, tensors = made(
        family, text, tmp_path, {"rtn": {"bits": 8, "group_size": "channel"}}, {"quantize-kv": {"number": number}}
    )
    assert config["kv_cache_scheme"]["type"] == ("float" if number == "fp8" else "int")
    assert tensors["model.layers.0.self_attn.k_scale"].shape == (1,)
    assert manifest.exports[0].verification.max_difference < 1e-3


def test_keys_and_values_alone(family, text, tmp_path):
    manifest, config, tensors = made(family, text, tmp_path, {"quantize-kv": {}})
    assert config["config_groups"] == {}
    assert tensors["model.layers.1.self_attn.v_scale"].shape == (1,)
    assert manifest.exports[0].verification.weights_equal
    assert manifest.exports[0].verification.max_difference < 1e-3


@pytest.mark.parametrize(
    "extra",
    [
        [QuantizeActivations(QuantizeActivationsParams())],
        [QuantizeActivations(QuantizeActivationsParams(scale="tensor"))],
        [QuantizeActivations(QuantizeActivationsParams(number="fp8"))],
        [QuantizeKv(QuantizeKvParams())],
    ],
)
def test_the_model_itself_computes_with_rounded_activations(family, tmp_path, extra):
    rows = random_rows()
    answers = []
    for index, more in enumerate(([], extra)):
        model = open_model(family("llama"), tmp_path / str(index))
        run_sweep(model, [Rtn(RtnParams(bits=8, group_size="channel")), *more], rows, PassContext())
        answers.append(reference_outputs(model, batches(rows, decoder=False))[0]["logits"])
    difference = float((answers[1] - answers[0]).abs().max())
    assert 0 < difference < 0.5 * float(answers[0].abs().max())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "phi3", "gpt_neox", "bert"])
def test_inputs_of_fused_layers_and_experts_are_rounded(family, tmp_path, name):
    model = open_model(family(name), tmp_path)
    rows = random_rows()
    passes = [Rtn(RtnParams(bits=8, group_size="channel")), QuantizeActivations(QuantizeActivationsParams())]
    results = run_sweep(model, passes, rows, PassContext())
    assert set(model.inputs) == set(model.quantized) == set(results[1].changed)
    rounded = reference_outputs(model, batches(rows, decoder=False))[0]
    model.store.inputs.clear()
    plain = reference_outputs(model, batches(rows, decoder=False))[0]
    key = next(iter(plain))
    assert not rounded[key].equal(plain[key])


def test_inputs_of_layers_in_floating_point_stay_as_they_are(family, tmp_path):
    model = open_model(family("llama"), tmp_path)
    passes = [Rtn(RtnParams(group_size=32, ignore=("*.down_proj",))), QuantizeActivations(QuantizeActivationsParams())]
    results = run_sweep(model, passes, [], PassContext())
    assert not [name for name in model.inputs if name.endswith("down_proj")]
    assert {skip.reason for skip in results[1].skipped} == {"its weight stays in floating point"}


def test_query_key_and_value_share_a_fixed_scale_and_nvfp4_a_divisor(family, tmp_path):
    model = open_model(family("llama", dtype="bfloat16"), tmp_path)
    passes = [Gptq(GptqParams(number="nvfp4")), QuantizeActivations(QuantizeActivationsParams(scale="tensor"))]
    run_sweep(model, passes, random_rows(), PassContext())
    names = [f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv"]
    assert len({model.inputs[name].scale for name in names}) == 1
    assert len({float(model.quantized_weight(name).divisor) for name in names}) == 1


@pytest.mark.parametrize(
    ("passes", "export", "message"),
    [
        ((TOKEN,), "safetensors", "rounds the inputs of quantized layers"),
        ((INT8, TOKEN, TOKEN), "safetensors", "cannot come after"),
        ((INT8, TOKEN), "onnx", "cannot hold quantized activations"),
        ((FP8,), "onnx", "cannot hold"),
        ((FP8,), "onnx-genai", "cannot hold"),
        (({"rtn": {"number": "nvfp4"}},), "safetensors:gptq", "cannot hold nvfp4"),
        (({"rtn": {"bits": 4, "group_size": 32}}, TOKEN), "safetensors:gptq", "cannot hold quantized activations"),
        (({"rtn": {"bits": 4, "group_size": 32, "symmetric": False}}, TOKEN), "safetensors", "asymmetric weights"),
        (({"rtn": {"number": "mxfp4"}}, TOKEN), "safetensors", "4-bit floating-point"),
        (({"rtn": {"number": "fp8", "bits": 4}},), "safetensors", "fp8 has no 4 bits"),
        (({"rtn": {"number": "nvfp4", "group_size": 32}},), "safetensors", "nvfp4 has no group size 32"),
        (({"rtn": {"number": "fp8", "symmetric": False}},), "safetensors", "fp8 has no zero points"),
        (({"rtn": {"group_size": "block"}},), "safetensors", "int has no groups of 128 x 128"),
        (({"rtn": {"number": "fp8", "group_size": "block"}},), "safetensors", "into blocks of 128 x 128"),
        (({"rtn": {"number": "fp8", "group_size": 32}},), "safetensors", "fp8 weights in groups"),
        (({"hqq": {"number": "fp8"}},), "safetensors", "cannot choose codes of fp8"),
        ((INT8, {"quantize-activations": {"symmetric": False}}), "safetensors", "can be asymmetric"),
        ((INT8, {"quantize-activations": {"observer": "mse"}}), "safetensors", "an observer finds a fixed scale"),
    ],
)
def test_what_cannot_be_is_refused_by_the_plan(family, text, passes, export, message):
    name, _, form = export.partition(":")
    params = {"format": form} if form else {}
    one = recipe(family("llama", dtype="bfloat16"), *steps(*passes), data=text, export=(name, params))
    with pytest.raises(UsageError, match=message):
        make_plan(one)


def test_a_fixed_scale_needs_calibration(family):
    with pytest.raises(UsageError, match="needs calibration data"):
        make_plan(recipe(family("llama"), *steps(INT8, FIXED)))


def test_mxfp4_needs_bfloat16(family):
    with pytest.raises(UsageError, match="unpacks mxfp4 weights to bfloat16"):
        make_plan(recipe(family("llama"), *steps({"rtn": {"number": "mxfp4"}})))


@pytest.mark.parametrize(
    "passes",
    [
        (),
        (INT8, TOKEN),
        ({"rtn": {"bits": 4, "group_size": 32}}, TOKEN),
        (FP8,),
        ({"cast": {"dtype": "bfloat16"}}, {"rtn": {"number": "nvfp4"}}),
        ({"cast": {"dtype": "bfloat16"}}, {"rotate": {}}, {"rtn": {"bits": 4, "group_size": 32}}),
    ],
)
def test_the_plan_knows_the_size(family, tmp_path, passes):
    folder = family("llama", tie_word_embeddings=True, vocab_size=512)
    plan = make_plan(recipe(folder, *steps(*passes)))
    build(plan.recipe, tmp_path / "made")
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "made" / "model.safetensors").values())
    assert plan.output_bytes == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize(
    ("passes", "near"),
    [
        ((), 0.01),
        (({"cast-fp16": {}},), 0.03),
        (({"quantize-dynamic": {"max_drop": 0.5}},), 0.05),
        (({"quantize-weights": {"bits": 8, "max_drop": 0.5}},), 0.08),
        (({"quantize-weights": {"products": "none", "max_drop": 0.5}},), 0.08),
    ],
)
def test_the_plan_knows_the_size_of_a_graph(family, tmp_path, passes, near):
    folder = family("bert", vocab_size=2048, hidden_size=128, intermediate_size=512)
    plan = make_plan(recipe(folder, *steps(*passes), export=("onnx", {})))
    build(plan.recipe, tmp_path / "made")
    graph = onnx_ir.load(tmp_path / "made" / "model.onnx").graph
    size = sum(value.const_value.nbytes for value in graph.initializers.values())
    assert plan.output_bytes == pytest.approx(size, rel=near)
