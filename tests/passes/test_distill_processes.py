"""Several processes that train together: the same losses as one with their batches, one artifact, and a common end."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import build, recipe
from llmopt.core.errors import LlmoptError, UsageError
from safetensors.torch import load_file

STEPS = {"steps": 6, "length": 16, "learning_rate": 3e-3, "held_out": 8, "evaluate_every": 2}


SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What accelerate's own configuration comes to."""


def launched(file, output, *kind, processes=2, program=("-m", "llmopt"), variables=None):
    """Run a recipe under accelerate's launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *kind, "--num_machines", "1"]
    launcher += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*launcher, "--main_process_port", str(port), *program, "run", str(file), "-o", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | (variables or {})
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def written(tmp_path, student, *passes):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(student, *passes).to_dict()))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "shards"])
def test_two_processes_learn_as_one_with_twice_the_batch(family, text, tmp_path, sharded):
    student = family("llama", num_hidden_layers=1)
    params = {"data": str(text), "teacher": str(family("llama")), **STEPS}
    one = build(recipe(student, ("distill", {**params, "batch_size": 8})), tmp_path / "one").passes[0]
    file = written(tmp_path, student, ("distill", {**params, "batch_size": 4}))
    how = {"program": (str(Path(__file__).with_name("sharded.py")),), "variables": SHARDED} if sharded else {}
    done = launched(file, tmp_path / "two", "--multi_gpu", **how)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "two" / "llmopt.json").read_text())
    curve = document["passes"][0]["curve"]
    assert len(curve) == len(one.curve) == 10
    for got, expected in zip(curve, one.curve, strict=True):
        assert got == pytest.approx(expected, rel=1e-4)
    assert document["passes"][0]["metrics"] == pytest.approx(one.metrics, rel=1e-4)
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(got[name], expected[name], atol=1e-4) for name in expected)
    assert done.stdout.count("Artifacts") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "recipe.yaml", "two"]


def test_shards_that_are_asked_for_and_not_made_are_refused(family, text, tmp_path, monkeypatch):
    for name, value in SHARDED.items():
        monkeypatch.setenv(name, value)
    params = {"data": str(text), "teacher": str(family("llama")), **STEPS}
    with pytest.raises(LlmoptError, match="does not shard"):
        build(recipe(family("llama", num_hidden_layers=1), ("distill", params)), tmp_path / "out")


@pytest.mark.slow
def test_an_error_ends_all_of_them(family, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Too short. " * 20)
    student = family("llama", num_hidden_layers=1)
    params = {"data": str(path), "teacher": str(family("llama")), **STEPS, "batch_size": 64}
    done = launched(written(tmp_path, student, ("distill", params)), tmp_path / "two", "--multi_gpu")
    assert done.returncode != 0
    assert "less than one batch" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "short.txt"]


@pytest.mark.parametrize("passes", [[("cast", {"dtype": "bfloat16"})], []])
def test_nothing_to_share_is_refused(family, tmp_path, monkeypatch, passes):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="2 processes have nothing to share"):
        build(recipe(family("llama"), *passes), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_that_starts_one_of_several_is_refused(family, text, tmp_path):
    params = {"data": str(text), "teacher": str(family("llama")), **STEPS}
    done = launched(written(tmp_path, family("llama"), ("distill", params)), tmp_path / "two", "--cpu")
    assert done.returncode != 0
    assert "accelerate started a single process" in done.stderr
    assert "--multi_gpu" in done.stderr
