"""Adapters extracted from two models: merged again, they restore the one; a lower rank leaves out the least."""

import json
import shutil

import pytest
import torch
import transformers
from families import random_rows
from helpers import build, recipe
from llmopt.core.errors import UsageError
from llmopt.core.progress import Silent
from llmopt.core.recipe import ModelSpec
from llmopt.pipeline.adapters import extract_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file


@pytest.fixture
def tuned(tmp_path):
    """Return what trains a model: each matrix of its blocks changes, by a given rank or wholly."""

    def train(base, rank=None, others=False):
        folder = tmp_path / "tuned"
        shutil.copytree(base, folder)
        tensors = load_file(folder / "model.safetensors")
        generator = torch.Generator().manual_seed(1)
        for name, tensor in tensors.items():
            if (
                tensor.ndim == 2
                and "embed" not in name
                and "wte" not in name
                and "wpe" not in name
                and "head" not in name
            ):
                rows, columns = tensor.shape
                inner = rank or min(rows, columns)
                change = torch.randn(rows, inner, generator=generator) @ torch.randn(
                    inner, columns, generator=generator
                )
                tensors[name] = tensor + 0.01 * change
            elif others and tensor.ndim == 1:
                tensors[name] = tensor + 0.1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return train


def extracted(model, base, output, rank, force=False):
    specs = ModelSpec(id=str(model)), ModelSpec(id=str(base))
    return extract_adapter(*specs, rank=rank, output=output, force=force, reporter=Silent())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_full_rank_restores_the_model(family, tuned, tmp_path, name):
    base, model = family(name), tuned(family(name))
    report = extracted(model, base, tmp_path / "adapter", rank=64)
    assert report["error_max_ratio"] < 1e-5
    assert report["layers_count"] == (14 if name == "llama" else 8)
    build(recipe(base, ("merge-adapter", {"adapters": [str(tmp_path / "adapter")]})), tmp_path / "merged")
    expected, made = load_file(model / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    for key, tensor in expected.items():
        assert float((made[key] - tensor).abs().max()) < 1e-5, key


def test_peft_loads_it_beside_the_base(family, tuned, tmp_path):
    base, model = family("llama"), tuned(family("llama"), rank=3)
    report = extracted(model, base, tmp_path / "adapter", rank=3)
    assert report["error_max_ratio"] < 1e-4  # the difference has this rank
    ids = torch.tensor(random_rows(2, 12))
    with torch.no_grad():
        opened = transformers.AutoModelForCausalLM.from_pretrained(base)
        got = PeftModel.from_pretrained(opened, tmp_path / "adapter")(ids).logits
        expected = transformers.AutoModelForCausalLM.from_pretrained(model)(ids).logits
    assert float((got - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "llmopt.json",
    ]


def test_what_is_left_out_is_the_least(family, tuned, tmp_path):
    base, model = family("llama"), tuned(family("llama"))
    extracted(model, base, tmp_path / "adapter", rank=5)
    name = "model.layers.0.self_attn.q_proj"
    parts = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    made = parts[f"base_model.model.{name}.lora_B.weight"] @ parts[f"base_model.model.{name}.lora_A.weight"]
    new, old = (load_file(folder / "model.safetensors")[f"{name}.weight"] for folder in (model, base))
    values = torch.linalg.svdvals(new - old)
    assert float((new - old - made).norm()) == pytest.approx(float(values[5:].norm()), rel=1e-3)


def test_what_no_adapter_holds_is_told(family, tuned, tmp_path):
    report = extracted(tuned(family("llama"), others=True), family("llama"), tmp_path / "adapter", rank=2)
    assert "model.norm.weight" in report["skipped"]
    assert json.loads((tmp_path / "adapter" / "llmopt.json").read_text())["adapter"]["skipped"] == report["skipped"]


def test_refusals(family, tuned, tmp_path):
    base = family("llama")
    with pytest.raises(UsageError, match="the same layers, bit for bit"):
        extracted(base, base, tmp_path / "adapter", rank=2)
    with pytest.raises(UsageError, match="was not made from"):
        extracted(base, family("llama", hidden_size=32), tmp_path / "adapter", rank=2)
    assert list(tmp_path.iterdir()) == []
    model = tuned(base)
    extracted(model, base, tmp_path / "adapter", rank=2)
    with pytest.raises(UsageError, match="exists already"):
        extracted(model, base, tmp_path / "adapter", rank=2)
    extracted(model, base, tmp_path / "adapter", rank=2, force=True)


def test_what_rounding_took_can_stand_beside_a_rounded_model(family, tmp_path):
    """The error of rounding, as an adapter: the rounded model with it answers nearer to the original."""
    original = family("llama")
    plain = ("safetensors", {"format": "plain"})
    build(recipe(original, ("rtn", {"bits": 3, "group_size": 32}), export=plain), tmp_path / "rounded")
    report = extracted(original, tmp_path / "rounded", tmp_path / "repair", rank=24)
    assert 0.1 < report["error_max_ratio"] < 0.9
    ids = torch.tensor(random_rows(4, 16))
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(original)(ids).logits
        rounded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "rounded")
        before = float((rounded(ids).logits - expected).square().mean())
        repaired = PeftModel.from_pretrained(rounded, tmp_path / "repair")
        after = float((repaired(ids).logits - expected).square().mean())
    assert after < 0.7 * before
