"""Adapters merged into their base: what peft computes with them beside it, and what is refused."""

import json

import pytest
import torch
import transformers
from families import random_rows
from helpers import build, recipe
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.pipeline.plan import make_plan
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

CLASS = {"llama": "AutoModelForCausalLM", "gpt2": "AutoModelForCausalLM", "bert": "AutoModelForSequenceClassification"}


def opened(folder, name="llama"):
    return getattr(transformers, CLASS[name]).from_pretrained(folder).eval()


def adapter(base, folder, name="llama", seed=0, **changes):
    """Write an adapter whose matrices are both random, and return its folder."""
    torch.manual_seed(seed)
    model = get_peft_model(opened(base, name), LoraConfig(**({"r": 4, "target_modules": "all-linear"} | changes)))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key and "magnitude" not in key:
                parameter.normal_(std=0.1)
            elif "magnitude" in key:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape))
    model.save_pretrained(folder)
    return folder


def answers(model):
    with torch.no_grad():
        return model(torch.tensor(random_rows(3, 12))).logits


def merged(base, output, *folders, **params):
    adapters = [str(folder) for folder in folders]
    return build(recipe(base, ("merge-adapter", {"adapters": adapters, **params})), output).passes[0]


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_alpha": 32}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_it_answers_as_base_and_adapter(family, tmp_path, name, changes):
    base = family(name)
    folder = adapter(base, tmp_path / "adapter", name, **changes)
    record = merged(base, tmp_path / "out", folder)
    expected = answers(PeftModel.from_pretrained(opened(base, name), folder))
    assert float((answers(opened(base, name)) - expected).abs().max()) > 1e-2
    assert float((answers(opened(tmp_path / "out", name)) - expected).abs().max()) < 1e-5 * max(
        1.0, float(expected.abs().max())
    )
    assert record.metrics == {"adapters_count": 1}
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert record.changed == [key for key in after if not torch.equal(before[key], after[key])]
    assert not any("norm" in key or "embed" in key for key in record.changed)


def test_several_with_weights(family, tmp_path):
    base = family("llama")
    folders = [adapter(base, tmp_path / f"adapter{seed}", seed=seed, target_modules=["q_proj"]) for seed in (1, 2)]
    merged(base, tmp_path / "out", *folders, weights=[0.5, -2.0])
    name = "model.layers.1.self_attn.q_proj.weight"
    expected = load_file(base / "model.safetensors")[name]
    for folder, weight in zip(folders, (0.5, -2.0), strict=True):
        parts = load_file(folder / "adapter_model.safetensors")
        path = f"base_model.model.{name.removesuffix('.weight')}"
        scale = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] / 4
        expected = expected + weight * scale * parts[f"{path}.lora_B.weight"] @ parts[f"{path}.lora_A.weight"]
    made = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert float((made - expected).abs().max()) < 1e-5


def test_the_merged_model_can_be_quantized(family, tmp_path):
    folder = adapter(family("llama"), tmp_path / "adapter")
    steps = ("merge-adapter", {"adapters": [str(folder)]}), ("rtn", {"bits": 8, "group_size": 32})
    made = build(recipe(family("llama"), *steps), tmp_path / "out")
    assert made.exports[0].verification.passed
    expected = answers(PeftModel.from_pretrained(opened(family("llama")), folder))
    assert float((answers(opened(tmp_path / "out")) - expected).abs().mean()) < 0.02 * float(expected.abs().mean())


class TestRefusals:
    def refused(self, base, *folders, error=UsageError, **params):
        adapters = [str(folder) for folder in folders]
        with pytest.raises(error) as caught:
            make_plan(recipe(base, ("merge-adapter", {"adapters": adapters, **params})))
        assert caught.value.hint
        return str(caught.value)

    def test_another_base(self, family, tmp_path):
        folder = adapter(family("llama"), tmp_path / "adapter")
        assert "64 x 96 in the adapter" in self.refused(family("llama", hidden_size=32), folder)
        assert "is not in" in self.refused(family("llama", num_hidden_layers=1), folder)
        assert "adapter for another model" in self.refused(family("gpt2"), folder)

    def test_what_is_no_adapter(self, family, tmp_path):
        base = family("llama")
        assert "there is no adapter_config.json" in self.refused(base, tmp_path / "missing")
        folder = adapter(base, tmp_path / "adapter")
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        assert "pickled weights only" in self.refused(base, folder)
        (folder / "adapter_model.bin").unlink()
        assert "holds no weights" in self.refused(base, folder)
        (folder / "adapter_model.safetensors").write_bytes(b"nonsense")
        assert "is damaged" in self.refused(base, folder, error=LlmoptError)

    def test_other_kinds(self, family, tmp_path):
        folder = adapter(family("llama"), tmp_path / "adapter")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
        assert "kind IA3" in self.refused(family("llama"), folder)

    def test_weights_that_do_not_fit(self, family, tmp_path):
        folder = adapter(family("llama"), tmp_path / "adapter")
        assert "1 adapters and 2 weights" in self.refused(family("llama"), folder, weights=[1.0, 2.0])
        dora = adapter(family("llama"), tmp_path / "dora", use_dora=True)
        assert "DoRA" in self.refused(family("llama"), dora, weights=[0.5])
        assert "DoRA" in self.refused(family("llama"), dora, folder)

    def test_after_rounding(self, family, tmp_path):
        folder = adapter(family("llama"), tmp_path / "adapter")
        steps = ("rtn", {"bits": 4, "group_size": 32}), ("merge-adapter", {"adapters": [str(folder)]})
        with pytest.raises(UsageError, match="cannot come after `rtn`"):
            make_plan(recipe(family("llama"), *steps))
