"""A file that may not grow: a small message, nothing left. What a full disk does is in tests/bad_input."""

import shutil
from functools import partial
from pathlib import Path

import pytest
from processes import command

resource = pytest.importorskip("resource")

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"


def limited(folder, kib, *arguments):
    """Run the command line in a process whose files may have so many KiB; return its status and what it said."""
    said = folder.with_name(f"{folder.name}-said")
    limits = (1024 * kib, 1024 * kib)
    process = command(folder, *arguments, said=said, first=partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits))
    process.join(timeout=300)
    return process.exitcode, said.read_text()


# How far it comes: the work store, a shard, the weights beside a graph.
@pytest.mark.parametrize(
    ("export", "kib"), [("safetensors", 4), ("safetensors", 100), ("safetensors", 500), ("onnx-genai", 1000)]
)
def test_a_file_that_may_not_grow(tmp_path, export, kib):
    arguments = ("quantize", TINY, "--group-size", "64", "--export", export, "-o", "made/out", "-q")
    code, said = limited(tmp_path, kib, *arguments)
    assert code == 1, said
    assert said.startswith("error: a file became larger than is allowed\n")
    assert "ulimit -f" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_the_former_artifact_stays(tmp_path):
    former = tmp_path / "out"
    shutil.copytree(TINY, former)
    (former / "llmopt.json").write_text("{}", encoding="utf-8")
    before = {path.name: path.read_bytes() for path in former.iterdir()}
    code, said = limited(tmp_path, 500, "quantize", TINY, "--group-size", "64", "-o", "out", "--force", "-q")
    assert code == 1, said
    assert {path.name: path.read_bytes() for path in former.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
