"""`llmopt verify --rebuild`: the recipe in the manifest, run again, gives the very bytes."""

import json
import shutil

import pytest
from helpers import recipe
from llmopt.core.errors import LlmoptError, UnmetError, UsageError
from llmopt.core.manifest import MANIFEST
from llmopt.core.progress import Silent
from llmopt.pipeline.output import file_record
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.rebuild import rebuild
from llmopt.pipeline.run import run_plan
from safetensors.torch import load_file, save_file


@pytest.fixture
def out(family, text, tmp_path, monkeypatch):
    """Return an artifact made with relative paths and little memory, so that small batches run through the blocks."""
    shutil.copytree(family("llama"), tmp_path / "model")
    shutil.copyfile(text, tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    made = recipe("model", ("gptq", {"group_size": 32}), data="text.txt")
    run_plan(make_plan(made, max_memory=700 << 20), tmp_path / "out", force=False, reporter=Silent())
    return tmp_path / "out"


def changed(out, edit):
    """Edit the manifest's plain data."""
    manifest = json.loads((out / MANIFEST).read_text())
    edit(manifest)
    (out / MANIFEST).write_text(json.dumps(manifest))


def test_an_artifact_is_built_again(out):
    assert rebuild(out, reporter=Silent()) == len(list(out.iterdir())) - 1  # all but the record of the run
    assert {path.name for path in out.parent.iterdir()} == {"model", "text.txt", "out"}


def test_what_differs_is_named(out):
    shard = out / "model.safetensors"
    tensors = load_file(shard)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    record = file_record(shard)

    def tell(manifest):
        manifest["exports"][0]["files"][shard.name] = {"bytes": record.bytes, "sha256": record.sha256}
        manifest["passes"][0]["metrics"]["damping_max_ratio"] = 0.5
        manifest["versions"]["torch"] = "1.0"

    changed(out, tell)
    with pytest.raises(UnmetError) as refused:
        rebuild(out, reporter=Silent())
    assert f"model.safetensors: differs in model.norm.weight (of {len(tensors)} tensors)" in refused.value.where
    assert "`passes` differs" in refused.value.where
    assert "torch 1.0 -> " in refused.value.hint


def test_a_changed_source_is_refused_before_anything_is_run(out, monkeypatch):
    monkeypatch.setattr("llmopt.pipeline.run.run_plan", None)
    with (out.parent / "model" / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(LlmoptError, match="the source is no longer what it was") as refused:
        rebuild(out, reporter=Silent())
    assert refused.value.exit_code == 1


def test_changed_calibration_data_are_refused_before_anything_is_run(out, monkeypatch):
    monkeypatch.setattr("llmopt.pipeline.run.run_plan", None)
    with (out.parent / "text.txt").open("a") as file:
        file.write("one more\n")
    with pytest.raises(LlmoptError, match="the calibration data is no longer what it was") as refused:
        rebuild(out, reporter=Silent())
    assert refused.value.exit_code == 1


def test_paths_are_those_of_the_recipe(out, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(LlmoptError, match="cannot build it again") as refused:
        rebuild(out, reporter=Silent())
    assert refused.value.exit_code == 1
    assert "in the folder where the artifact was built" in refused.value.hint


def test_code_of_a_model_is_not_run_for_an_artifact(out):
    def tell(manifest):
        manifest["recipe"]["model"] = {"id": "model", "trust_remote_code": True}

    changed(out, tell)
    with pytest.raises(UsageError, match="Python code"):
        rebuild(out, reporter=Silent())


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(UsageError, match="no artifact"):
        rebuild(tmp_path, reporter=Silent())
