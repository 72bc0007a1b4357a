from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest
from families import FAMILIES, make_model
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.core.exports import ExportContext
from llmopt.core.quantized import Grid
from llmopt.exporters.onnx_genai import OnnxGenAI, OnnxGenAIParams
from llmopt.exporters.onnx_genai_builder import known_architectures, rope_fault
from llmopt.runtimes.onnx_genai import OnnxGenAI as GenAIRuntime
from standin import StandIn, quantized_standin, word_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3"]
INT4 = Grid(bits=4, group_size=32, symmetric=True)
PROMPT = [5, 9, 200, 31, 7, 111, 90, 4, 77, 12]


def export(model: StandIn, directory: Path, **params: Any) -> OnnxGenAI:
    exporter = OnnxGenAI(OnnxGenAIParams(**params))
    exporter.check(model.facts, next(iter(model.quantized.values()), None))
    exporter.export(model, directory, ExportContext())
    return exporter


def check_alike(model: Any, directory: Path) -> None:
    """Logits for every position, and eight tokens, are those of transformers."""
    import numpy as np
    import torch

    session = GenAIRuntime().open(directory, threads=1)
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    assert np.abs(session.outputs({"input_ids": ids.numpy()})["logits"] - expected).max() < 1e-4
    made = model.generate(
        ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert session.generate(PROMPT, 8) == made[0, len(PROMPT) :].tolist()
    session.close()


@pytest.mark.parametrize("family", NAMES)
def test_float(family: str, tmp_path: Path):
    model = StandIn(make_model(FAMILIES[family]), tokenizer=word_tokenizer())
    assert export(model, tmp_path).weights_equal(model, tmp_path) is None
    check_alike(model.model, tmp_path)


@pytest.mark.parametrize("family", NAMES)
def test_int4(family: str, tmp_path: Path):
    model = quantized_standin(make_model(FAMILIES[family]), INT4, word_tokenizer())
    assert model.quantized
    exporter = export(model, tmp_path, activations="float32")
    assert exporter.weights_equal(model, tmp_path)
    check_alike(model.model, tmp_path)


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
@pytest.mark.parametrize("group_size", [16, "channel", "tensor"])
def test_every_grid(bits: int, group_size: Any, tmp_path: Path):
    grid = Grid(bits=bits, group_size=group_size, symmetric=False)
    model = quantized_standin(make_model(FAMILIES["llama"]), grid, word_tokenizer())
    exporter = export(model, tmp_path, activations="float32")
    assert exporter.weights_equal(model, tmp_path)
    check_alike(model.model, tmp_path)


def test_int8_activations_stay_near(tmp_path: Path):
    import torch

    model = quantized_standin(make_model(FAMILIES["llama"]), INT4, word_tokenizer())
    export(model, tmp_path)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = model.model(ids).logits.log_softmax(-1)
    made = GenAIRuntime().open(tmp_path, threads=1).outputs({"input_ids": ids.numpy()})["logits"]
    divergence = (expected.exp() * (expected - torch.from_numpy(made).log_softmax(-1))).sum(-1).mean()
    assert divergence < 0.01


def test_some_layers_left_alone(tmp_path: Path):
    model = make_model(FAMILIES["llama"])
    chosen = {f"model.layers.{layer}.self_attn.{name}": INT4 for layer in (0, 1) for name in ("q_proj", "v_proj")}
    standin = StandIn(model, chosen, word_tokenizer())
    assert export(standin, tmp_path, activations="float32").weights_equal(standin, tmp_path)
    check_alike(model, tmp_path)


def test_bfloat16_scales(tmp_path: Path):
    import torch

    model = quantized_standin(make_model(FAMILIES["llama"]).to(torch.bfloat16), INT4, word_tokenizer())
    assert export(model, tmp_path).weights_equal(model, tmp_path)


def test_cuda_folder_holds_the_codes_with_scales_in_float16(tmp_path: Path):
    model = quantized_standin(make_model(FAMILIES["llama"]), INT4, word_tokenizer())
    assert export(model, tmp_path, target="cuda").weights_equal(model, tmp_path)


def test_logits_of_every_position_on_request(tmp_path: Path):
    import onnx

    for wanted, folder in ((False, tmp_path / "last"), (True, tmp_path / "all")):
        folder.mkdir()
        export(StandIn(make_model(FAMILIES["llama"]), tokenizer=word_tokenizer()), folder, all_logits=wanted)
        graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        (logits,) = (value for value in graph.output if value.name == "logits")
        assert (logits.type.tensor_type.shape.dim[1].dim_value == 1) is not wanted


def test_a_tied_embedding_is_stored_once(tmp_path: Path):
    model = StandIn(make_model(FAMILIES["llama"], tie_word_embeddings=True), tokenizer=word_tokenizer())
    export(model, tmp_path)
    weights = sum(parameter.nbytes for parameter in model.model.parameters())
    assert (tmp_path / "model.onnx.data").stat().st_size < weights + 20_000
    check_alike(model.model, tmp_path)


def test_the_same_model_gives_the_same_bytes_and_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export(quantized_standin(make_model(FAMILIES["llama"]), INT4, word_tokenizer()), tmp_path / name)
        files = sorted((tmp_path / name).iterdir())
        assert all(file.is_file() for file in files)
        assert not [file for file in files if str(tmp_path).encode() in file.read_bytes()]
        digests.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
    assert digests[0] == digests[1]
    assert capfd.readouterr().out == ""


def test_the_graph_says_nothing_of_the_checkout_that_python_lies_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The builder asks git for it, so each commit there would give other bytes."""
    git, folder = tmp_path / "bin" / "git", tmp_path / "out"
    git.parent.mkdir()
    folder.mkdir()
    git.write_text("#!/bin/sh\necho 0123456789abcdef\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{git.parent}:{os.environ['PATH']}")
    export(StandIn(make_model(FAMILIES["llama"]), tokenizer=word_tokenizer()), folder)
    graph = (folder / "model.onnx").read_bytes()
    assert version("onnxruntime-genai").encode() in graph
    assert b"0123456" not in graph


def test_unknown_architecture_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="does not know GPT2LMHeadModel") as error:
        export(StandIn(make_model(FAMILIES["gpt2"]), tokenizer=word_tokenizer()), tmp_path)
    assert "`onnx`" in str(error.value.hint)


def test_model_without_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="tokenizer"):
        export(StandIn(make_model(FAMILIES["llama"])), tmp_path)


def test_float16_on_cpu_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="float16"):
        export(StandIn(make_model(FAMILIES["llama"]), tokenizer=word_tokenizer()), tmp_path, precision="float16")


def test_what_the_builder_raises_is_told(tmp_path: Path):
    model = make_model(FAMILIES["qwen2"])
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(LlmoptError, match="cannot build Qwen2ForCausalLM") as error:
        export(StandIn(model, tokenizer=word_tokenizer()), tmp_path)
    assert "dynamic" in str(error.value.where)


def test_rotary_scaling_that_the_builder_gets_wrong_is_known():
    flat = {"rope_type": "linear", "factor": 8.0}
    full = {"full_attention": flat, "sliding_attention": {"rope_type": "default"}}
    assert rope_fault("Gemma3ForCausalLM", {"rope_parameters": full})
    assert rope_fault("Gemma3ForCausalLM", {"rope_scaling": flat, "rope_local_base_freq": 10000.0})
    assert rope_fault("Gemma3ForCausalLM", {"rope_parameters": full | {"full_attention": {}}}) is None
    assert rope_fault("Qwen2ForCausalLM", {"rope_parameters": flat}) is None
    assert rope_fault("LlamaForCausalLM", {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert rope_fault("LlamaForCausalLM", {"rope_scaling": {"rope_type": "llama3"}}) is None
    assert rope_fault("LlamaForCausalLM", {}) is None
    assert rope_fault("Qwen2ForCausalLM", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    assert rope_fault("Qwen2ForCausalLM", {"rope_scaling": {"rope_type": "yarn", "truncate": False}}) is None


ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 32}
LLAMA3 = ROPE | {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = ROPE | {"rope_type": "longrope", "short_factor": [1.5] * 8, "long_factor": [2.0] * 8}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "truncate": False}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 4}),
        ("phi3", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
        ("qwen2", {"rope_parameters": YARN, "max_position_embeddings": 16384}),
    ],
)
def test_windows_and_rotary_scaling(family: str, changes: dict[str, Any], tmp_path: Path):
    model = StandIn(make_model(FAMILIES[family], **changes), tokenizer=word_tokenizer())
    export(model, tmp_path)
    check_alike(model.model, tmp_path)


def test_checking_imports_nothing_heavy():
    facts = StandIn(make_model(FAMILIES["llama"]), tokenizer=word_tokenizer()).facts
    import msgspec

    code = f"""
import json, sys, msgspec
from llmopt.core.facts import ModelFacts
from llmopt.core.quantized import Grid
from llmopt.exporters.onnx import Onnx, OnnxParams
from llmopt.exporters.onnx_genai import OnnxGenAI, OnnxGenAIParams
facts = msgspec.json.decode({msgspec.json.encode(facts)!r}, type=ModelFacts)
grid = Grid(bits=4, group_size=32, symmetric=True)
Onnx(OnnxParams()).check(facts, grid)
OnnxGenAI(OnnxGenAIParams()).check(facts, grid)
heavy = {{"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "numpy"}}
print(json.dumps(sorted(heavy & set(sys.modules))))
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(made.stdout) == []


def test_the_builder_names_the_families_we_promise():
    assert {"LlamaForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM", "Gemma3ForCausalLM"} <= known_architectures()
