"""Norm weights folded into the layers that follow: every norm multiplies by one, the function stays."""

import shutil

import pytest
import torch
from families import FAMILIES, random_rows
from helpers import assert_near, build, open_model, recipe
from llmopt.core.passes import PassContext
from llmopt.models.text import batches
from llmopt.passes.fold_norms import FoldNorms, FoldNormsParams
from llmopt.passes.numerics.grid import round_to_nearest
from llmopt.passes.rtn import Rtn, RtnParams
from llmopt.pipeline.sweep import run_sweep
from safetensors.torch import load_file, save_file

DECODERS = [name for name, family in FAMILIES.items() if family.is_decoder and family.text]
MIXTURES = ("mixtral", "qwen3_moe")
NORMS = {
    "gpt2": ["ln_1", "ln_2"],
    "opt": ["self_attn_layer_norm", "final_layer_norm"],
    "gemma2": ["input_layernorm", "pre_feedforward_layernorm"],
    "gemma3": ["input_layernorm", "pre_feedforward_layernorm"],
    "mixtral": ["input_layernorm"],
    "qwen3_moe": ["input_layernorm"],
}
"""The norms of a block that can be folded, where they are not Llama's two."""


def outputs(model):
    materialized = model.materialize()
    (batch,) = batches(random_rows(4, 24, seed=9), decoder=bool(materialized.config.is_encoder_decoder))
    with torch.no_grad():
        return next(iter(materialized(**batch, return_dict=True).values()))


def folded(folder, work, *more):
    model = open_model(folder, work)
    results = run_sweep(model, [FoldNorms(FoldNormsParams()), *more], random_rows(), PassContext())
    return model, results


@pytest.mark.parametrize("name", DECODERS)
def test_every_norm_before_a_layer_multiplies_by_one(name, family, tmp_path):
    model, (result, *_) = folded(family(name), tmp_path)
    norms = NORMS.get(name, ["input_layernorm", "post_attention_layernorm"])
    found = {key for key in model.checkpoint.tensors if key.endswith(".weight") and key.split(".")[-2] in norms}
    assert len(found) >= 2 * len(norms)
    inside = {key for key in found if any(part.isdigit() for part in key.split("."))}
    one = 0.0 if name.startswith("gemma") else 1.0
    for key in inside:
        assert bool((model.read(key) == one).all()), key
        assert not bool((model.checkpoint.read(key) == one).all()), key
    assert result.metrics["folded_norms_count"] == len(inside)
    assert_near(outputs(model), outputs(open_model(family(name), tmp_path / "b")), factor=5)


def test_a_whole_run(family, text, tmp_path):
    made = recipe(family("gpt2"), ("fold-norms", {}), export=("safetensors", {"format": "plain"}), data=text)
    manifest = build(made, tmp_path / "artifact")
    assert manifest.exports[0].verification.passed
    before, after = (open_model(path, tmp_path / path.name) for path in (family("gpt2"), tmp_path / "artifact"))
    assert_near(outputs(after), outputs(before), factor=5)
    bias, weight = (
        before.checkpoint.read("transformer.h.0.ln_1.bias"),
        before.checkpoint.read("transformer.h.0.ln_1.weight"),
    )
    assert_near(after.checkpoint.read("transformer.h.0.ln_1.bias"), bias / weight)


def test_layers_without_a_norm_of_their_own_say_so(family, tmp_path):
    _, (result,) = folded(family("mixtral"), tmp_path)
    left = {skip.name.rpartition(".")[2] for skip in result.skipped}
    assert left == {"o_proj", "w1", "w2", "w3"}
    assert {skip.reason for skip in result.skipped} == {"no norm makes its input alone"}


def test_a_norm_with_a_zero_keeps_it(family, tmp_path):
    source = shutil.copytree(family("llama"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.input_layernorm.weight"
    tensors[name][5] = 0.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    before = outputs(open_model(source, tmp_path / "a"))
    model, (result,) = folded(source, tmp_path / "b")
    assert model.read(name)[5] == 0
    assert bool((model.read(name)[torch.arange(64) != 5] == 1).all())
    assert any("1 channels of its norm are 0" in note for note in result.notes)
    assert_near(outputs(model), before, factor=5)


def test_rounding_sees_the_folded_weights(family, tmp_path):
    model, _ = folded(family("llama"), tmp_path, Rtn(RtnParams(group_size=32)))
    layer = "model.layers.0.self_attn.q_proj"
    norm = model.checkpoint.read("model.layers.0.input_layernorm.weight")
    expected = round_to_nearest(model.checkpoint.read(f"{layer}.weight") * norm, model.quantized[layer], torch.float32)
    assert float((model.quantized_weight(layer).codes != expected.codes).float().mean()) < 1e-3
    assert bool((model.read("model.layers.0.input_layernorm.weight") == 1).all())
