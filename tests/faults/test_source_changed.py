"""A file that changes while it is read: found out, exit 1, nothing written. One that may not be written to works."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import recipe
from llmopt.core.errors import LlmoptError
from llmopt.core.progress import Silent
from llmopt.core.reads import Read
from llmopt.core.recipe import EvaluationSpec
from llmopt.pipeline import reads, run
from llmopt.pipeline.artifact import read_run
from llmopt.pipeline.cache.store import CacheSettings
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.reads import Reads
from msgspec.structs import replace
from safetensors.torch import save_file


@pytest.fixture
def model(family, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(family("llama"), "model")
    shutil.copyfile(text, "text.txt")
    return tmp_path / "model"


def build_while(monkeypatch, change, cache=None, made=None):
    """Build an artifact; `change` is called in the midst of it."""
    plan = make_plan(made or recipe("model", ("gptq", {"group_size": 32}), data="text.txt"))
    before = run.make_reference

    def meanwhile(*arguments, **named):
        change()
        return before(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(run, "make_reference", meanwhile)
        return run.run_plan(plan, Path("out"), force=False, reporter=Silent(), cache=cache)


def rewrite(path):
    """Write the same bytes into another file of that name, as a second download does."""
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


def flip_last_byte(path):
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns + 1
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=times)


def test_nothing_of_it_is_kept(model, tmp_path, monkeypatch):
    """What was computed of other bytes must not stand in the store under the hash of the first."""
    cache = CacheSettings(tmp_path / "cache")
    kept = (model / "model.safetensors").read_bytes()
    with pytest.raises(LlmoptError, match="was changed while it was read"):
        build_while(monkeypatch, lambda: flip_last_byte(model / "model.safetensors"), cache)
    (model / "model.safetensors").write_bytes(kept)
    build_while(monkeypatch, lambda: None, cache)
    record = read_run(tmp_path / "out")
    assert record is not None
    assert not any(step.cached or step.blocks_resumed for step in record.steps)


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/config.json", "text.txt"])
def test_a_change_is_found_out(model, tmp_path, monkeypatch, name):
    def change():
        with (tmp_path / name).open("ab") as file:
            file.write(b"\n")

    with pytest.raises(LlmoptError, match=f"{name}` was changed while it was read") as refused:
        build_while(monkeypatch, change)
    assert refused.value.exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


FRESH = [
    ("model/added_tokens.json", "{}"),
    ("model/chat_template.jinja", "{{ messages }}"),
    ("teacher/added_tokens.json", "{}"),
    ("adapter/more.safetensors", ""),
]


@pytest.mark.parametrize(("name", "content"), FRESH)
def test_a_file_that_appears_is_found_out(everything, tmp_path, monkeypatch, name, content):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(LlmoptError, match=f"`{name}` appeared while it was to be read") as refused:
        build_while(monkeypatch, lambda: (tmp_path / name).write_text(content), made=everything)
    assert refused.value.exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_shard_that_appears_is_found_out(model, tmp_path, monkeypatch):
    (model / "model.safetensors").rename(model / "first.safetensors")  # without an index every shard is read
    shard = tmp_path / "shard"
    save_file({"more": torch.zeros(1)}, shard)
    with pytest.raises(LlmoptError, match=r"more.safetensors` appeared"):
        build_while(monkeypatch, lambda: shard.rename(model / "more.safetensors"))


def test_half_a_shard_makes_the_model_another(model, tmp_path, monkeypatch):
    """The folder can no longer be read at all, so what would be read cannot be told."""
    (model / "model.safetensors").rename(model / "first.safetensors")
    with pytest.raises(LlmoptError, match="`model` was changed while it was read") as refused:
        build_while(monkeypatch, lambda: (model / "more.safetensors").write_text("half"))
    assert refused.value.exit_code == 1


@pytest.mark.parametrize("name", ["notes.md", "code.py", "llmopt.json", "more.safetensors", "sub/config.json"])
def test_a_file_that_is_not_read_may_appear(model, tmp_path, monkeypatch, name):
    (model / name).parent.mkdir(exist_ok=True)
    build_while(monkeypatch, lambda: (model / name).write_text("{}"))
    assert (tmp_path / "out" / "llmopt.json").is_file()


def test_nothing_is_kept_of_a_model_to_which_a_file_was_added(model, tmp_path, monkeypatch):
    cache = CacheSettings(tmp_path / "cache")
    with pytest.raises(LlmoptError, match="appeared"):
        build_while(monkeypatch, lambda: (model / "added_tokens.json").write_text("{}"), cache)
    (model / "added_tokens.json").unlink()
    build_while(monkeypatch, lambda: None, cache)
    record = read_run(tmp_path / "out")
    assert record is not None
    assert not any(step.cached or step.blocks_resumed for step in record.steps)


def test_a_change_of_a_byte_is_found_out(model, tmp_path, monkeypatch):
    with pytest.raises(LlmoptError, match="was changed while it was read"):
        build_while(monkeypatch, lambda: flip_last_byte(model / "model.safetensors"))
    assert not (tmp_path / "out").exists()


def test_a_source_that_vanishes_is_found_out(model, tmp_path, monkeypatch):
    with pytest.raises((LlmoptError, OSError)):
        build_while(monkeypatch, lambda: shutil.rmtree(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


def test_the_same_bytes_again_are_no_change(model, tmp_path, monkeypatch):
    build_while(monkeypatch, lambda: rewrite(model / "model.safetensors"))
    assert (tmp_path / "out" / "llmopt.json").is_file()


def test_a_change_before_the_hash_is_known_is_one(tmp_path, monkeypatch):
    """Then nobody can tell which bytes were read first."""
    file = tmp_path / "file"
    file.write_text("one")

    def late(path):
        rewrite(path)
        return "hash"

    monkeypatch.setattr(reads, "file_sha256", late)
    watched = Reads([Read("model", "m", "file", file)])
    assert watched.sha256(file) == "hash"
    with pytest.raises(LlmoptError, match="was changed"):
        watched.check()


@pytest.fixture
def everything(model, family, tmp_path):
    """Return a recipe that reads files of every kind, and a change of each as a reader cannot notice it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    shutil.copytree(family("llama"), "teacher")
    get_peft_model(AutoModelForCausalLM.from_pretrained("model"), LoraConfig(r=2)).save_pretrained("adapter")
    for name in ("learnt.txt", "test.txt"):
        shutil.copyfile("text.txt", name)
    learn = {"teacher": "teacher", "data": "learnt.txt", "steps": 1, "batch_size": 2, "length": 16, "held_out": 2}
    passes = [("merge-adapter", {"adapters": ["adapter"]}), ("distill", learn), ("gptq", {"group_size": 32})]
    made = recipe("model", *passes, data="text.txt")
    evaluation = EvaluationSpec(data="test.txt", length=24, samples=6)
    return replace(made, gates=("perplexity<=1000000",), evaluation=(evaluation,))


KINDS = [
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "model/generation_config.json",
    "teacher/model.safetensors",
    "teacher/config.json",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "learnt.txt",
    "text.txt",
    "test.txt",
]


@pytest.mark.parametrize("name", KINDS)
def test_a_change_of_any_file_is_found_out(everything, tmp_path, monkeypatch, name):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(LlmoptError, match=f"`{name}` was changed while it was read") as refused:
        build_while(monkeypatch, lambda: flip_last_byte(tmp_path / name), made=everything)
    assert refused.value.exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_other_test_data_spoil_no_result_of_a_pass(everything, tmp_path, monkeypatch):
    cache = CacheSettings(tmp_path / "cache")
    with pytest.raises(LlmoptError, match="was changed while it was read"):
        build_while(monkeypatch, lambda: flip_last_byte(tmp_path / "test.txt"), cache, everything)
    build_while(monkeypatch, lambda: None, cache, everything)
    record = read_run(tmp_path / "out")
    assert record is not None
    assert [step.cached for step in record.steps[:3]] == [True] * 3


def test_each_file_is_hashed_once(everything, tmp_path, monkeypatch):
    hashed, compute = [], reads.file_sha256

    def counted(path):
        hashed.append(path)
        return compute(path)

    monkeypatch.setattr(reads, "file_sha256", counted)
    build_while(monkeypatch, lambda: None, CacheSettings(tmp_path / "cache"), everything)
    assert sorted(hashed) == sorted(set(hashed))
    record = read_run(tmp_path / "out")
    assert record is not None
    assert [one.path for one in record.inputs] == [str(path) for path in sorted(hashed)]
    assert all(len(one.sha256) == 64 for one in record.inputs)


def test_a_source_that_may_not_be_written_to(model, tmp_path, monkeypatch):
    for path in model.iterdir():
        path.chmod(0o444)
    model.chmod(0o555)
    before = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    try:
        build_while(monkeypatch, lambda: None)
    finally:
        model.chmod(0o755)
    assert {path.name: path.stat().st_mtime_ns for path in model.iterdir()} == before
    assert os.access(tmp_path / "out" / "config.json", os.W_OK)  # what is made of it may be
    assert (tmp_path / "out" / "config.json").stat().st_mode & 0o200
