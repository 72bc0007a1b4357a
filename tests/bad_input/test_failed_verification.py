"""An exporter that writes something else than the model: exit 3, the figures, and the artifact left aside."""

import json
import shutil

import pytest
from broken import TINY, check_message, tree

ARGUMENTS = ("quantize", TINY, "--group-size", "64", "--symmetric")


@pytest.fixture
def wrong_scale(monkeypatch):
    """Let the safetensors exporter write every scale a hundredth too large."""
    from llmopt.exporters.shards import ShardWriter

    write = ShardWriter.write

    def wrong(self, name, tensor):
        write(self, name, tensor * 1.01 if name.endswith("_scale") else tensor)

    monkeypatch.setattr(ShardWriter, "write", wrong)


@pytest.fixture
def wrong_embedding(monkeypatch):
    """Let the exporter shift the embedding: no quantized weight differs, but the answers do."""
    from llmopt.exporters.shards import ShardWriter

    write = ShardWriter.write

    def wrong(self, name, tensor):
        write(self, name, tensor + 0.05 if "embed_tokens" in name else tensor)

    monkeypatch.setattr(ShardWriter, "write", wrong)


WHAT = "the artifact is not the model that was exported (safetensors)"
HINT = "it lies at out.failed for a look; nothing was written to out"


def test_a_wrong_scale(shell, wrong_scale):
    ended = shell.run(*ARGUMENTS, "-o", "out")
    check_message(ended, code=3, what=WHAT, where="weights NOT equal", hint=HINT)
    for figure in ("max difference ", "mean KL ", "top-1 agreement ", "allowed max difference 0.001, mean KL 0.001"):
        assert figure in ended.err
    assert [path.name for path in shell.folder.iterdir()] == ["out.failed"]
    manifest = json.loads((shell.folder / "out.failed" / "llmopt.json").read_text())
    assert not manifest["exports"][0]["verification"]["passed"]


def test_wrong_answers_from_right_codes(shell, wrong_embedding):
    ended = shell.run(*ARGUMENTS, "-o", "out", "--json")
    check_message(ended, code=3, what=WHAT, where="weights equal bit for bit", hint=HINT)
    assert json.loads(ended.out)["exit_code"] == 3


def test_the_former_artifact_stays(shell, wrong_scale, artifact):
    shutil.copytree(artifact, "out")
    before = tree(shell.folder / "out")
    check_message(shell.run(*ARGUMENTS, "-o", "out", "--force"), code=3, what=WHAT, hint=HINT)
    assert tree(shell.folder / "out") == before
    assert sorted(path.name for path in shell.folder.iterdir()) == ["out", "out.failed"]


def test_a_second_failure_replaces_the_first(shell, wrong_scale):
    shell.run(*ARGUMENTS, "-o", "out")
    check_message(shell.run(*ARGUMENTS, "-o", "out"), code=3, what=WHAT, hint=HINT)
    assert [path.name for path in shell.folder.iterdir()] == ["out.failed"]


def test_a_folder_of_someone_else_at_that_place_stays(shell, wrong_scale):
    (shell.folder / "out.failed").mkdir()
    (shell.folder / "out.failed" / "notes.txt").write_text("mine")
    hint = "it lies at out.failed.2 for a look"
    check_message(shell.run(*ARGUMENTS, "-o", "out"), code=3, what=WHAT, hint=hint)
    assert (shell.folder / "out.failed" / "notes.txt").read_text() == "mine"


def test_one_export_of_several(shell, wrong_scale):
    ended = shell.run(*ARGUMENTS, "--export", "safetensors", "--export", "onnx-genai", "-o", "out")
    check_message(ended, code=3, what=WHAT, hint=HINT)
    assert sorted(path.name for path in (shell.folder / "out.failed").iterdir()) == [
        "README.md",
        "llmopt.json",
        "llmopt.reference.json",
        "llmopt.run.json",
        "onnx-genai",
        "safetensors",
    ]
