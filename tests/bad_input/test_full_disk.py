"""A disk that fills up, wherever in the run it does."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from broken import TINY, check_message, tree
from llmopt.core.manifest import RUN

ARGUMENTS = ("quantize", TINY, "--group-size", "64")
CALIBRATION = ("--calibration", TINY / "calibration.txt", "--samples", "16", "--length", "64")
HINT = "free some space, or write to another disk with -o"


@pytest.fixture
def disk(shell, artifact):
    """Return a function that mounts a small disk at `disk`, a former artifact on it at `disk/out`."""
    place = shell.folder / "disk"
    place.mkdir()
    mounted = []

    def mount(spare_kib):
        used = 4 * (sum(-(-path.stat().st_size // 4096) for path in artifact.rglob("*")) + 4)
        size = f"size={used + spare_kib}k"
        command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("may not mount a disk here")
        mounted.append(place)
        shutil.copytree(artifact, place / "out")

    yield mount
    for one in mounted:
        subprocess.run(["umount", "-l", str(one)], check=True)


# The run needs about 900 KiB for its work and as much for the artifact.
@pytest.mark.parametrize("spare_kib", [0, 40, 300, 700, 900, 1300])
@pytest.mark.parametrize("export", ["safetensors", "onnx-genai"])
def test_a_small_disk(shell, disk, spare_kib, export):
    disk(spare_kib)
    arguments = (*ARGUMENTS, "--export", export, "-o", "disk/out", "--force", "--no-cache")
    shell.refuses(*arguments, code=1, what="the disk is full", hint=HINT)


# Results of passes take about 640 KiB there.
@pytest.mark.parametrize("spare_kib", [40, 300, 620])
@pytest.mark.parametrize("calibrated", [False, True], ids=["rtn", "gptq"])
def test_a_small_disk_for_the_cache(shell, disk, monkeypatch, spare_kib, calibrated):
    """The run goes on without it, and nothing of it stays there."""
    disk(spare_kib)
    monkeypatch.setenv("LLMOPT_CACHE_SIZE", "1GiB")  # else it would not begin: half of the free disk is too little
    shell.run("quantize", TINY, "-o", "plain", "--group-size", "64", "--no-cache", *CALIBRATION[: calibrated * 6])
    arguments = ("--group-size", "64", "-o", "out", "--cache-dir", "disk/cache", *CALIBRATION[: calibrated * 6])
    ended = shell.run("quantize", TINY, *arguments)
    assert ended.code == 0, ended.err
    assert "going on without the cache at disk/cache: its disk is full" in ended.err
    assert artifact_tree(shell.folder / "out") == artifact_tree(shell.folder / "plain")
    assert not list((shell.folder / "disk" / "cache" / "entries").iterdir())


def test_a_disk_that_is_full_for_a_pass_on_the_whole_model(shell, disk, monkeypatch):
    disk(900)
    monkeypatch.setenv("LLMOPT_CACHE_SIZE", "1GiB")
    (shell.folder / "recipe.yaml").write_text(
        f"model: {TINY}\npasses: [rotate, prune-depth: {{layers: [1]}}]\nexports: [safetensors]\n"
    )
    ended = shell.run("run", "recipe.yaml", "-o", "out", "--cache-dir", "disk/cache")
    assert ended.code == 0, ended.err
    assert "going on without the cache" in ended.err
    shell.run("run", "recipe.yaml", "-o", "plain", "--no-cache")
    assert artifact_tree(shell.folder / "out") == artifact_tree(shell.folder / "plain")


def artifact_tree(folder):
    """Return the files but the record of how the run went, which holds times."""
    return {name: made for name, made in tree(folder).items() if not str(name).endswith(RUN)}


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def full_for_safetensors(*arguments, **options):
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


PLACES = {
    "work": ("llmopt.models.store.save_file", full_for_safetensors, "safetensors"),
    "shard": ("llmopt.exporters.shards.ShardWriter.write", full, "safetensors"),
    "side-files": ("llmopt.models.handle.TorchModel.save_side_files", full, "safetensors"),
    "manifest": ("llmopt.pipeline.run.write_record", full, "safetensors"),
    "answers": ("llmopt.pipeline.manifest.write_fingerprint", full, "safetensors"),
    "commit": ("llmopt.pipeline.output.Staging.commit", full, "safetensors"),
    "folder": ("tempfile.mkdtemp", full, "safetensors"),
    "graph": ("onnx_ir.save", full, "onnx-genai"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_write_that_fails(shell, monkeypatch, place):
    name, fails, export = PLACES[place]
    monkeypatch.setattr(name, fails)
    what, code = ("cannot write to", 2) if place == "folder" else ("the disk is full", 1)
    hint = "may write to" if place == "folder" else HINT
    shell.builds_nothing(*ARGUMENTS, "--export", export, code=code, what=what, hint=hint)


def test_a_report_that_cannot_be_printed(shell):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    import sys

    with Path("/dev/full").open("w") as screen:
        ended = subprocess.run(
            [sys.executable, "-m", "llmopt", "inspect", TINY],
            stdout=screen,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: the disk is full\n")
    assert "Traceback" not in ended.stderr


def test_the_former_artifact_comes_back_when_the_new_one_cannot_be_put_in_place(shell, monkeypatch, artifact):
    shutil.copytree(artifact, "out")
    before = tree(shell.folder)
    rename = Path.rename

    def once(self, target):
        if self.name == "artifact" and self.parent.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", once)
    ended = shell.run(*ARGUMENTS, "-o", "out", "--force")
    check_message(ended, code=1, what="input/output error", hint="")
    assert tree(shell.folder) == before
