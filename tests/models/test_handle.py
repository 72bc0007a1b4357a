"""A model on its way: what is read back after passes is what they made."""

import json

import pytest
import torch
from families import FAMILIES
from helpers import grid, open_model
from llmopt.core.passes import PassContext
from llmopt.models import store
from llmopt.passes.rtn import Rtn, RtnParams
from llmopt.pipeline.sweep import run_sweep


def rounded(folder, work, **params):
    """Return the handle after RTN over all blocks."""
    model = open_model(folder, work)
    one = Rtn(RtnParams(**({"group_size": 32, "bits": 8} | params)))
    (result,) = run_sweep(model, [one], [], PassContext())
    return model, result


@pytest.mark.parametrize("name", FAMILIES)
def test_quantized_weights_are_near_the_source_and_the_right_way_round(name, family, tmp_path):
    model, result = rounded(family(name), tmp_path)
    assert sorted(result.changed) == sorted(linear.name for linear in model.facts.linears)
    assert sorted(model.quantized) == sorted(result.changed)
    assert not result.skipped
    for key in model.checkpoint.tensors:
        source, now = model.checkpoint.read(key), model.read(key)
        layer = key.removesuffix(".weight")
        if layer not in model.quantized:
            assert now.equal(source)
            continue
        step = model.quantized_weight(layer).scale.max()
        assert float((now - source).abs().max()) <= float(step) * 0.51, key


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_in_memory_holds_exactly_the_quantized_weights(name, family, tmp_path):
    model, _ = rounded(family(name), tmp_path, bits=4)
    skeleton, whole = model.skeleton(), model.materialize()
    views = [view for site in skeleton.sites for view in site.views]
    assert views
    for view in views:
        held = view.of(whole.get_parameter(view.parameter).data)
        assert held.equal(model.quantized_weight(view.linear.name).dequantize()), view.linear.name


def test_experts_in_one_tensor_are_put_back_the_right_way_round(family, tmp_path):
    """gpt-oss stores experts as one 3-D tensor (experts, in, out); square ones cannot be told by their shape."""
    import transformers
    from families import VOCABULARY, make_tokenizer

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "gpt_oss",
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        architectures=["GptOssForCausalLM"],
    )
    source = transformers.GptOssForCausalLM._from_config(config, dtype=torch.float32)
    folder = tmp_path / "gpt-oss"
    with torch.no_grad():
        for value in source.parameters():
            value.normal_(0, 0.1)
    source.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    model, result = rounded(folder, tmp_path / "work")
    experts = [name for name in result.changed if ".experts." in name]
    assert len(experts) == 2 * 2 * 4
    for key in model.checkpoint.tensors:
        error = (model.read(key) - model.checkpoint.read(key)).abs().max()
        assert float(error) < 0.01, key


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_take_the_dtype_of_the_weights(dtype, family, tmp_path):
    model, _ = rounded(family("llama", dtype=dtype), tmp_path)
    assert model.facts.dtype == dtype
    for name in model.quantized:
        assert str(model.quantized_weight(name).scale.dtype) == f"torch.{dtype}"
        assert str(model.read(f"{name}.weight").dtype) == f"torch.{dtype}"


def test_tied_weights_stay_tied(family, tmp_path):
    model = open_model(family("qwen2"), tmp_path)
    assert "lm_head.weight" not in model.checkpoint.tensors
    whole = model.materialize()
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    assert whole.lm_head.weight.equal(model.checkpoint.read("model.embed_tokens.weight"))
    assert model.linear_modules()["lm_head"] is None


def test_a_cast_is_seen_everywhere(family, tmp_path):
    model = open_model(family("llama"), tmp_path).cast("bfloat16")
    assert model.facts.dtype == "bfloat16"
    assert {dtype for dtype, _ in model.tensor_specs().values()} == {"bfloat16"}
    assert all(tensor.dtype == torch.bfloat16 for _, tensor in model.tensors())
    (tmp_path / "out").mkdir()
    model.save_side_files(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_cast_that_overflows_names_the_weight(family, tmp_path):
    from llmopt.core.errors import LlmoptError
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    for path in family("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = open_model(folder, tmp_path / "work").cast("float16")
    with pytest.raises(LlmoptError) as caught:
        dict(model.tensors())
    assert caught.value.what == "weight `model.layers.1.mlp.up_proj.weight` does not fit into float16"
    assert "bfloat16" in (caught.value.hint or "")


def test_side_files_are_complete(family, tmp_path):
    model = open_model(family("llama"), tmp_path / "work")
    out = tmp_path / "out"
    out.mkdir()
    model.save_side_files(out, config_changes={"quantization_config": {"quant_method": "x"}})
    source = {path.name for path in family("llama").iterdir()} - {"model.safetensors"}
    assert {path.name for path in out.iterdir()} == source
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "x"}
    assert config == model.facts.config


def test_an_ignored_layer_is_skipped_with_its_pattern(family, tmp_path):
    model, result = rounded(family("llama"), tmp_path, ignore=("*.down_proj", "model.layers.0"))
    skipped = dict(result.skipped)
    wanted = {
        linear.name: "*.down_proj" if linear.name.endswith("down_proj") else "model.layers.0"
        for linear in model.facts.linears
        if linear.name.endswith("down_proj") or linear.name.startswith("model.layers.0.")
    }
    assert skipped == {name: f"ignored by `{pattern}`" for name, pattern in wanted.items()}
    assert not set(skipped) & set(result.changed)


def test_the_grid_of_every_layer_is_kept(family, tmp_path):
    model, _ = rounded(family("llama"), tmp_path, bits=3, symmetric=False)
    assert set(model.quantized.values()) == {grid(3, 32, symmetric=False)}


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_rewritten_model_answers_as_before_and_is_read_from_its_own_files(name, family, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", 1 << 14)
    model = open_model(family(name), tmp_path).cast("bfloat16")
    renamed: list[str] = []
    again = model.rewritten(
        ((name, model.read(name)) for name in model.tensor_specs()),
        {"llmopt_test": 1},
        side_files=lambda folder: renamed.extend(path.name for path in folder.glob("tokenizer*")),
    )
    assert len(list(again.location.folder.glob("*.safetensors"))) > 3
    assert again.facts.config["llmopt_test"] == 1
    assert again.facts.dtype == "bfloat16"
    assert {one.name for one in again.facts.linears} == {one.name for one in model.facts.linears}
    assert again.tensor_specs().keys() == model.tensor_specs().keys()
    assert "tokenizer.json" in renamed
    for key in model.tensor_specs():
        assert again.read(key).equal(model.read(key))


def test_views_are_written_alone(family, tmp_path):
    """A row of a matrix is written as that row: neither refused as shared nor with the whole matrix behind it."""
    model = open_model(family("llama"), tmp_path)
    whole = torch.arange(12.0).reshape(3, 4)
    again = model.rewritten(iter([("a", whole[0]), ("b", whole[:, 1]), ("c", whole)]), {})
    assert again.read("a").equal(whole[0])
    assert again.read("b").equal(whole[:, 1])
    assert again.read("c").equal(whole)
