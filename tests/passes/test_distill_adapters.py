"""Adapters over a quantized student: the codes stay, the adapter learns, and engines load it beside the base."""

import json

import pytest
import torch
import transformers
from families import random_rows
from helpers import build, recipe, refused_plan
from llmopt.calibration.packed import load_rows
from llmopt.core.errors import UsageError
from llmopt.core.progress import Silent
from llmopt.core.text import TextRequest
from llmopt.models.text import load_tokenizer
from llmopt.passes.training.losses import divergence
from llmopt.pipeline.verify import verify
from peft import PeftModel
from safetensors.torch import load_file, save_file

LEARN = {"steps": 12, "batch_size": 4, "length": 16, "learning_rate": 1e-2, "held_out": 8, "lora_rank": 4}
RTN = ("rtn", {"bits": 2, "group_size": 32})
CLASS = {"bert": "AutoModelForSequenceClassification"}


def made_with(base, text, *, rounds=RTN, export=("safetensors", {}), **changes):
    return recipe(base, rounds, ("distill", {"data": str(text), **LEARN, **changes}), export=export)


def opened(folder, name="llama"):
    kind = getattr(transformers, CLASS.get(name, "AutoModelForCausalLM"))
    packed = "quantization_config" in json.loads((folder / "config.json").read_text())
    changes = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if packed else {}
    return kind.from_pretrained(folder, dtype=torch.float32, **changes).eval()


def answers(model, rows):
    with torch.no_grad():
        return model(torch.tensor([list(row) for row in rows])).logits


def layout(name):
    return "auto" if name != "gpt2" else "plain"  # readers of packed codes take Linear layers only


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_adapter_learns_and_the_codes_stay(family, text, tmp_path, name):
    """What was measured on held-out rows while it learnt is what base and adapter give, opened with peft."""
    base, export = family(name), ("safetensors", {"format": layout(name)})
    build(recipe(base, RTN, export=export), tmp_path / "before")
    made = build(made_with(base, text, export=export), tmp_path / "out")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("before", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    record, export = made.passes[1], made.exports[0]
    assert record.changed == []
    assert record.metrics["held_out_kl_after_nats"] < 0.9 * record.metrics["held_out_kl_before_nats"]
    assert export.verification.passed
    assert export.adapted.passed
    assert export.adapted.weights_equal
    assert export.adapted.runtime.startswith("peft ")
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= export.files.keys()
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (4, 8, name == "gpt2")
    packing = name != "bert"
    request = TextRequest(str(text), None, 16, packing, LEARN["steps"] * LEARN["batch_size"], LEARN["held_out"])
    rows = load_rows(request, load_tokenizer(base), tmp_path / "rows.bin", seed=0, reporter=Silent()).held_out
    if packing:
        student = PeftModel.from_pretrained(opened(tmp_path / "out", name), tmp_path / "out" / "adapter")
        found = divergence("kl", answers(student, rows), answers(opened(base, name), rows))
        assert float(found.mean()) == pytest.approx(record.metrics["held_out_kl_after_nats"], rel=1e-3)


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_base_and_adapter_are_the_dequantized_weight_and_a_product(family, text, tmp_path, form):
    """The definition, computed from the files alone: dequantized weight + alpha / rank * up @ down."""
    base = family("llama", dtype="float16")
    export = ("safetensors", {"format": form})
    build(made_with(base, text, lora_alpha=6, export=export), tmp_path / "out")
    build(made_with(base, text, lora_alpha=6, export=("safetensors", {"format": "plain"})), tmp_path / "plain")
    parts = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    layers = [key.removesuffix(".lora_A.weight") for key in parts if key.endswith(".lora_A.weight")]
    assert len(layers) == 14
    merged = opened(tmp_path / "plain")
    with torch.no_grad():
        for layer in layers:
            down, up = parts[f"{layer}.lora_A.weight"], parts[f"{layer}.lora_B.weight"]
            assert down.shape[0] == up.shape[1] == 4
            path = layer.removeprefix("base_model.model.")
            weight = weights[f"{path}.weight"] + 6 / 4 * up @ down
            merged.get_submodule(path).weight.copy_(weight)
    rows = random_rows(3, 12)
    expected = answers(merged, rows)
    beside = PeftModel.from_pretrained(opened(tmp_path / "plain"), tmp_path / "out" / "adapter")
    assert float((answers(opened(tmp_path / "plain"), rows) - expected).abs().max()) > 1e-3
    assert float((answers(beside, rows) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_an_adapter_that_is_not_the_one_learnt_is_found(family, text, tmp_path, monkeypatch):
    """A wrong matrix in the file fails the verification by its bits and by its answers."""
    from llmopt.core.errors import UnmetError
    from llmopt.exporters import safetensors

    write = safetensors.write_adapter

    def wrong(folder, tensors, config):
        write(folder, {name: tensor * 1.5 for name, tensor in tensors.items()}, config)

    monkeypatch.setattr(safetensors, "write_adapter", wrong)
    with pytest.raises(UnmetError, match="with its adapter") as caught:
        build(made_with(family("llama"), text), tmp_path / "out")
    assert "weights NOT equal" in str(caught.value)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(safetensors, "same_adapter", lambda *_: True)
    with pytest.raises(UnmetError, match="with its adapter") as caught:
        build(made_with(family("llama"), text), tmp_path / "other")
    assert "weights NOT equal" not in str(caught.value)


def test_a_large_base_is_verified_block_by_block(family, text, tmp_path, monkeypatch):
    from llmopt.pipeline import adapted

    monkeypatch.setattr(adapted, "WHOLE_BYTES", 0)
    made = build(made_with(family("llama"), text), tmp_path / "out")
    assert made.exports[0].adapted.runtime.endswith(", block by block")
    assert made.exports[0].adapted.passed


def test_it_is_verified_by_its_files(family, text, tmp_path):
    from llmopt.core.errors import UnmetError

    build(made_with(family("llama"), text), tmp_path / "out")
    (record,) = verify(tmp_path / "out", reporter=Silent())
    assert record.verification.passed
    assert record.adapted is None  # the kept answers are the base's
    path = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(UnmetError, match="was changed"):
        verify(tmp_path / "out", reporter=Silent())


def test_a_run_goes_on_where_it_was(family, text, tmp_path, monkeypatch):
    from llmopt.passes.training.loop import Loop

    kept = {"checkpoint": str(tmp_path / "kept"), "checkpoint_every": 5}
    build(made_with(family("llama"), text), tmp_path / "whole")
    step, failed = Loop._step, []

    def failing(self, number):
        if number == 7 and not failed:
            failed.append(number)
            raise RuntimeError("power cut")
        return step(self, number)

    monkeypatch.setattr(Loop, "_step", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        build(made_with(family("llama"), text, **kept), tmp_path / "out")
    build(made_with(family("llama"), text, **kept), tmp_path / "out")
    whole, resumed = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_floating_student_still_merges(family, text, tmp_path):
    learn = ("distill", {"data": str(text), "teacher": str(family("llama", num_hidden_layers=3)), **LEARN})
    made = build(recipe(family("llama"), learn), tmp_path / "out")
    assert made.exports[0].adapted is None
    assert made.passes[0].changed
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize(
    "rounds", [("rtn", {"number": "fp8"}), ("gptq", {"bits": 3, "group_size": 32})], ids=["fp8", "gptq"]
)
def test_any_grid_can_lie_below(family, text, tmp_path, rounds):
    """Unlike weights that learn on their grid, adapters need no grid of integers."""
    learn = ("distill", {"data": str(text), **LEARN, "lora_targets": ["q_proj", "down_proj"]})
    made = build(recipe(family("llama"), rounds, learn, data=text), tmp_path / "out")
    assert made.exports[0].adapted.passed
    assert made.passes[1].metrics["adapted_layers_count"] == 4
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 4


def test_what_is_measured_is_base_and_adapter(family, text, tmp_path):
    from llmopt.pipeline.artifact import Artifact
    from llmopt.pipeline.measuring.subjects import subject_of

    build(made_with(family("llama"), text), tmp_path / "out")
    rows = torch.tensor(random_rows(2, 12))
    session = subject_of(Artifact(tmp_path / "out", None, None, None), name="out").open()
    got = torch.from_numpy(session.outputs({"input_ids": rows.numpy()})["logits"])
    base = opened(tmp_path / "out")
    assert float((got - answers(base, rows)).abs().max()) > 1e-3
    assert torch.allclose(got, answers(PeftModel.from_pretrained(base, tmp_path / "out" / "adapter"), rows), atol=1e-5)


def test_it_is_told_and_reported(family, text, tmp_path):
    from llmopt.cli.views import manifest_sections
    from llmopt.pipeline.loading import snippets

    made = build(made_with(family("llama"), text), tmp_path / "out")
    words = str(manifest_sections(made, tmp_path / "out", source_bytes=1))
    assert f"--enable-lora --lora-modules recovered={tmp_path}/out/adapter" in words
    made.passes[1].metrics["adapter_rank_max_count"] = 40
    assert "--max-lora-rank 64 " in str(manifest_sections(made, tmp_path / "out", source_bytes=1))
    assert "safetensors + adapter" in words
    assert "beside its base" in made.exports[0].notes[0]
    peft, vllm = snippets(made.exports[0], str(tmp_path / "out"), "LlamaForCausalLM")
    compile(vllm.code, "vllm", "exec")
    scope = {}
    exec(peft.code, scope)
    assert isinstance(scope["model"], PeftModel)


class TestRefusals:
    @pytest.mark.parametrize("export", ["onnx", "onnx-genai", "openvino"])
    def test_other_exports(self, family, text, export):
        rounds = ("rtn", {"bits": 4, "group_size": 32})
        made = made_with(family("llama"), text, rounds=rounds, export=(export, {}))
        assert "cannot hold an adapter" in refused_plan(made)

    @pytest.mark.parametrize(
        "later",
        [("rtn", {}), ("cast", {"dtype": "float16"}), ("quantize-kv", {}), ("prune-depth", {"layers": 1})],
        ids=lambda step: step[0],
    )
    def test_passes_after_it(self, family, text, later):
        learn = ("distill", {"data": str(text), **LEARN})
        assert "cannot come after `" in refused_plan(recipe(family("llama"), RTN, learn, later))

    def test_graph_passes_after_it(self, family, text):
        learn = ("distill", {"data": str(text), **LEARN})
        made = recipe(family("llama"), RTN, learn, ("fuse", {}), export=("onnx", {}))
        assert "`fuse` cannot come after `distill`" in refused_plan(made)

    def test_layers_that_are_not_linear(self, family, text, tmp_path):
        with pytest.raises(UsageError, match="cannot be kept beside the model"):
            build(made_with(family("llama"), text, lora_targets=["embed_tokens"]), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
