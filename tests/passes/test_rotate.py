"""Rotations: other weights, the same function, and refused where that cannot be."""

import json
import shutil

import pytest
import torch
import transformers
from families import FAMILIES, Family, random_rows, save_family
from helpers import assert_near, build, open_model, recipe
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.core.passes import PassContext
from llmopt.models.text import batches
from llmopt.passes.rotate import Rotate, RotateParams
from llmopt.pipeline.plan import make_plan
from outliers import write_outliers
from safetensors.torch import load_file, save_file

ROTATED = ("llama", "qwen2", "qwen3", "mistral", "phi3", "mixtral", "qwen3_moe")
BASE = {key: value for key, value in FAMILIES["llama"].config.items() if key != "model_type"}
OTHERS = {
    "gemma": Family("Gemma", "GemmaForCausalLM", {"model_type": "gemma", **BASE, "head_dim": 16}),
    "granitemoe": Family(
        "GraniteMoE",
        "GraniteMoeForCausalLM",
        {"model_type": "granitemoe", **BASE, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    ),
    "gpt_oss": Family(
        "GPT-OSS",
        "GptOssForCausalLM",
        {"model_type": "gpt_oss", **BASE, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "qwen2_moe": Family(
        "Qwen2-MoE",
        "Qwen2MoeForCausalLM",
        {"model_type": "qwen2_moe", **BASE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 48},
    ),
    "deepseek_v3": Family(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        {"model_type": "deepseek_v3", **BASE, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1}
        | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
        | {"first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32}
        | {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
    ),
    "reward": Family("Llama", "LlamaForSequenceClassification", {"model_type": "llama", **BASE, "num_labels": 1}),
}
"""Norms of 1 + weight, experts in one tensor, (in, out) experts with biases, a shared expert, latent attention."""

LATENT = ("deepseek_v3",)
"""Those whose layer for values makes keys in the same rows."""

INNER = ("_b_proj.weight", "gate_up_proj_bias")
"""Matrices between two others, and biases, that do not meet the stream."""

RUN_TIME = {
    "gemma2": "`model.layers.0.post_attention_layernorm` weighs something else than what layers read",
    "gemma3": "`model.layers.0.post_attention_layernorm` weighs something else than what layers read",
    "cohere": "`model.layers.0.input_layernorm` subtracts the mean or adds a bias",
    "olmo2": "no layer of `model.layers.0` reads what a norm makes of the stream",
    "headless": "no layer reads its last norm",
}
STRANGE = {
    "cohere": Family("Cohere", "CohereForCausalLM", {"model_type": "cohere", **BASE}),
    "olmo2": Family("OLMo 2", "Olmo2ForCausalLM", {"model_type": "olmo2", **BASE}),
    "headless": Family("Llama", "LlamaModel", {"model_type": "llama", **BASE}),
}
PLANNED = {
    "gpt2": "a LayerNorm",
    "gpt_neox": "a LayerNorm",
    "opt": "a LayerNorm",
    "bert": "a LayerNorm",
    "vit": "a LayerNorm",
    "t5": "several streams",
    "whisper": "several streams",
}


@pytest.fixture
def folder(family, monkeypatch, tmp_path):
    """Return the folder of a tiny model of any family that is named here."""
    others = OTHERS | STRANGE

    def of(name, **changes):
        if name not in others:
            return family(name, **changes)
        monkeypatch.setitem(FAMILIES, name, others[name])
        return save_family(name, tmp_path / f"{name}-source", **changes)

    return of


def outputs(model):
    whole = model if isinstance(model, transformers.PreTrainedModel) else model.materialize()
    (batch,) = batches(random_rows(4, 24, seed=9), decoder=bool(whole.config.is_encoder_decoder))
    with torch.no_grad():
        return next(iter(whole(**batch, return_dict=True).values()))


def changed(source, target, module, change):
    """Write the model in `source` to `target` with a weight that is multiplied by a number, or put in its place."""
    if source != target:
        shutil.copytree(source, target)
    tensors, name = load_file(target / "model.safetensors"), f"{module}.weight"
    tensors[name] = change(tensors[name]) if callable(change) else tensors[name] * change
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def rotated(source, work, seed=0, **params):
    model = open_model(source, work)
    return Rotate(RotateParams(**params)).run(model, PassContext(seed=seed))


@pytest.mark.parametrize("name", [*ROTATED, *OTHERS])
def test_the_function_stays(name, folder, tmp_path):
    source = folder(name)
    before = open_model(source, tmp_path / "before")
    model, result = rotated(source, tmp_path / "after")
    assert_near(outputs(model), outputs(before), factor=5)
    assert result.metrics["folded_norms_count"] == 5
    assert result.metrics["block_difference_max_ratio"] < 1e-5
    assert result.metrics["logit_difference_max_ratio"] < 1e-5
    assert [skip.name for skip in result.skipped] == (["model.layers.0", "model.layers.1"] if name in LATENT else [])
    for key, tensor in before.tensors():
        if key.endswith(("model.norm.weight", "input_layernorm.weight", "post_attention_layernorm.weight")):
            assert bool((model.read(key) == (0.0 if name == "gemma" else 1.0)).all()), key
        elif tensor.ndim >= 2 and not key.endswith(INNER):
            assert key in result.changed, key
            assert not model.read(key).equal(tensor), key


@pytest.mark.parametrize("name", [*ROTATED, "gpt2", "opt", "gemma2", "bert", "t5"])
def test_values_alone_are_rotated_where_the_stream_cannot_be(name, family, tmp_path):
    before = open_model(family(name), tmp_path / "before")
    model, result = rotated(family(name), tmp_path / "after", residual=False)
    assert_near(outputs(model), outputs(before), factor=5)
    assert result.metrics["rotated_values_count"] == (6 if name == "t5" else 2)
    assert result.skipped == []
    assert set(result.changed) < set(before.checkpoint.tensors)
    for key in result.changed:
        assert not model.read(key).equal(before.read(key)), key


def test_layers_that_make_no_values_of_their_own_are_skipped(family, tmp_path):
    """GPT-NeoX's fused layer has query, key and value head by head."""
    _, result = rotated(family("gpt_neox"), tmp_path, residual=False)
    assert [skip.name for skip in result.skipped] == ["gpt_neox.layers.0", "gpt_neox.layers.1"]
    assert not result.changed


def test_tensors_that_the_model_does_not_use_are_skipped(family, tmp_path):
    source = shutil.copytree(family("llama"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["extra.weight"], tensors["extra.scale"] = torch.ones(8, 64), torch.ones(3)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    _, result = rotated(source, tmp_path / "work")
    assert [skip.name for skip in result.skipped] == ["extra.weight"]
    assert "does not use it" in result.skipped[0].reason


def test_the_stream_alone(family, tmp_path):
    model, result = rotated(family("llama"), tmp_path / "a", values=False)
    assert result.metrics["rotated_values_count"] == 0
    assert_near(outputs(model), outputs(open_model(family("llama"), tmp_path / "b")), factor=5)


@pytest.mark.parametrize("width", [48, 60, 80])
def test_widths_that_are_no_power_of_two(width, family, tmp_path):
    source = family("llama", hidden_size=width, head_dim=12)
    model, _ = rotated(source, tmp_path / "a")
    assert_near(outputs(model), outputs(open_model(source, tmp_path / "b")), factor=5)


def test_the_seed_tells_the_weights(family, tmp_path):
    name = "model.layers.1.self_attn.o_proj.weight"
    made = [rotated(family("llama"), tmp_path / str(index), seed)[0].read(name) for index, seed in enumerate((0, 0, 1))]
    assert made[0].equal(made[1])
    assert not made[0].equal(made[2])


def test_half_precision_is_rounded_once(family, tmp_path):
    """The same model in float32 gives the same rotated weights, rounded to bfloat16."""
    source, wide = family("llama", dtype="bfloat16"), tmp_path / "wide"
    shutil.copytree(source, wide)
    tensors = {name: tensor.float() for name, tensor in load_file(wide / "model.safetensors").items()}
    save_file(tensors, wide / "model.safetensors", metadata={"format": "pt"})
    narrow, full = rotated(source, tmp_path / "a")[0], rotated(wide, tmp_path / "b")[0]
    for name, tensor in full.tensors():
        assert narrow.read(name).equal(tensor.to(torch.bfloat16)), name
    expected = outputs(open_model(source, tmp_path / "before"))
    assert float((outputs(narrow) - expected).abs().max()) < 0.03 * float(expected.abs().max())


def test_a_weight_that_no_longer_fits_is_named(family, tmp_path):
    source = changed(family("llama", dtype="float16"), tmp_path / "source", "model.layers.1.input_layernorm", 30000)
    changed(source, source, "model.layers.1.self_attn.k_proj", 100)
    with pytest.raises(LlmoptError) as caught:
        rotated(source, tmp_path / "work")
    assert caught.value.what == "the rotated weight `model.layers.1.self_attn.k_proj.weight` does not fit into float16"
    assert "bfloat16" in (caught.value.hint or "")


def test_a_large_value_channel_does_not_drown_the_others(family, tmp_path):
    """Rows of v that are 50 times as large, and columns of o 1/50: rounded, it is as good as without."""
    source = family("llama")
    name = "model.layers.{}.self_attn.{}_proj.weight"
    tensors = load_file(source / "model.safetensors")
    scale = torch.ones(32)
    scale[::16] = 50.0
    for layer in (0, 1):
        tensors[name.format(layer, "v")] *= scale.unsqueeze(1)
        tensors[name.format(layer, "o")] /= scale.reshape(2, 16).repeat_interleave(2, 0).reshape(-1)
    unequal = shutil.copytree(source, tmp_path / "unequal")
    save_file(tensors, unequal / "model.safetensors", metadata={"format": "pt"})
    first, second = rotated(source, tmp_path / "a")[0], rotated(unequal, tmp_path / "b")[0]
    for key in (name.format(1, "v"), name.format(1, "o")):
        assert_near(second.read(key), first.read(key), factor=5)


class TestTied:
    def test_embeddings_are_untied_when_the_last_norm_is_folded_into_the_head(self, family, tmp_path):
        model, result = rotated(family("qwen2"), tmp_path)
        assert model.facts.config["tie_word_embeddings"] is False
        assert model.facts.parameters == open_model(family("qwen2"), tmp_path / "b").facts.parameters + 272 * 64
        assert result.notes == ["`lm_head.weight` is a tensor of its own now: it no longer equals the embeddings"]
        whole = model.materialize()
        assert whole.lm_head.weight is not whole.model.embed_tokens.weight
        assert not whole.lm_head.weight.equal(whole.model.embed_tokens.weight)
        assert model.linear_modules()["lm_head"] == "lm_head"

    def test_they_stay_tied_when_there_is_nothing_to_fold(self, family, tmp_path):
        source = changed(
            family("qwen2"), tmp_path / "source", "model.norm", lambda weight: torch.full_like(weight, 1.5)
        )
        model, result = rotated(source, tmp_path / "work")
        assert result.notes == []
        assert "lm_head.weight" not in model.checkpoint.tensors
        assert model.facts.config["tie_word_embeddings"] is True
        assert_near(outputs(model), outputs(open_model(source, tmp_path / "b")), factor=5)


class TestRefusals:
    @pytest.mark.parametrize("name", PLANNED)
    def test_what_the_outline_shows_is_refused_by_the_plan(self, name, family):
        with pytest.raises(UsageError) as caught:
            make_plan(recipe(family(name), ("rotate", {})))
        assert caught.value.what == f"the residual stream of {FAMILIES[name].architecture} cannot be rotated"
        assert PLANNED[name] in (caught.value.where or "")
        assert "residual: false" in (caught.value.hint or "")

    @pytest.mark.parametrize("name", RUN_TIME)
    def test_the_rest_before_anything_is_written(self, name, folder, tmp_path):
        with pytest.raises(UsageError) as caught:
            build(recipe(folder(name), ("rotate", {})), tmp_path / "artifact")
        assert caught.value.what.startswith("the residual stream of ")
        assert RUN_TIME[name] in (caught.value.where or "")
        assert caught.value.hint
        assert not (tmp_path / "artifact").exists()

    @pytest.mark.parametrize(
        "earlier", [("smooth", {}), ("awq", {"group_size": 32, "scales_only": True}), ("rotate", {}), ("rtn", {})]
    )
    def test_an_order_that_makes_no_sense(self, earlier, family, text):
        with pytest.raises(UsageError) as caught:
            make_plan(recipe(family("llama"), earlier, ("rotate", {}), data=text))
        assert caught.value.what == f"`rotate` cannot come after `{earlier[0]}`"

    def test_nothing_to_rotate(self, family):
        with pytest.raises(UsageError) as caught:
            make_plan(recipe(family("llama"), ("rotate", {"residual": False, "values": False})))
        assert caught.value.what == "nothing to rotate"


class TestRuns:
    @pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe"])
    def test_a_plain_artifact_is_loaded_by_transformers(self, name, family, tmp_path):
        made = recipe(family(name), ("rotate", {}), export=("safetensors", {"format": "plain"}))
        manifest = build(made, tmp_path / "artifact")
        assert manifest.exports[0].verification.passed
        kind = getattr(transformers, FAMILIES[name].architecture)
        loaded = kind.from_pretrained(tmp_path / "artifact", dtype=torch.float32).eval()
        assert_near(outputs(loaded), outputs(open_model(family(name), tmp_path / "work")), factor=5)
        again = kind.from_pretrained(family(name), dtype=torch.float32)
        assert not loaded.get_input_embeddings().weight.equal(again.get_input_embeddings().weight)

    @pytest.mark.parametrize("passes", ["rtn", "gptq", "smooth-rtn"])
    def test_rounding_after_it(self, passes, family, text, tmp_path):
        *more, last = passes.split("-")
        steps = [("rotate", {}), *((name, {}) for name in more), (last, {"group_size": 32, "bits": 8})]
        made = recipe(family("qwen2"), *steps, data=text)
        manifest = build(made, tmp_path / "artifact")
        parity = manifest.exports[0].verification
        assert parity.passed
        assert parity.weights_equal
        config = json.loads((tmp_path / "artifact" / "config.json").read_text(encoding="utf-8"))
        assert config["tie_word_embeddings"] is False
        assert "lm_head" in config["quantization_config"]["ignore"]
        loaded = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "artifact", dtype=torch.float32).eval()
        expected = outputs(open_model(family("qwen2"), tmp_path / "work"))
        assert float((outputs(loaded) - expected).abs().max()) < 0.1 * float(expected.abs().max())

    @pytest.mark.parametrize("export", ["onnx", "onnx-genai"])
    def test_onnx_is_verified(self, export, family, tmp_path):
        steps = [("rotate", {}), ("rtn", {"group_size": 32})]
        manifest = build(recipe(family("qwen2"), *steps, export=(export, {})), tmp_path / "artifact")
        assert manifest.exports[0].verification.passed
        assert manifest.exports[0].verification.weights_equal

    @pytest.mark.parametrize("steps", [("cast", "rotate"), ("rotate", "cast")])
    def test_a_cast_may_come_before_or_after(self, steps, family, tmp_path):
        params = {"cast": {"dtype": "bfloat16"}, "rotate": {}}
        manifest = build(recipe(family("qwen2"), *((name, params[name]) for name in steps)), tmp_path / "artifact")
        assert manifest.exports[0].verification.passed

    def test_outliers_are_spread(self, family, tmp_path):
        """Rounding to 4 bits with one scale a row: the error with outlier channels falls to that without."""
        source = write_outliers(family("llama"), tmp_path / "outliers", "norms", every=16)
        expected = outputs(open_model(source, tmp_path / "work"))
        errors = {}
        for name, steps in {"plain": [], "rotated": [("rotate", {})]}.items():
            rounding = ("rtn", {"group_size": "channel"})
            made = recipe(source, *steps, rounding, export=("safetensors", {"format": "plain"}))
            build(made, tmp_path / name)
            got = outputs(transformers.LlamaForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval())
            errors[name] = float((got - expected).square().mean())
        assert errors["rotated"] < errors["plain"] / 2
