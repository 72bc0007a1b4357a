"""Artifacts under make: what they depend on, when they are built again, and the example Makefile."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers import build, recipe
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.core.manifest import MANIFEST
from llmopt.pipeline.depfile import write_depfile
from llmopt.pipeline.outdated import why_outdated
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.versions import own_version, versions

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-llama"
VERSIONS = {"llmopt": own_version(), **versions()}
NAMES = ["plain", "a b", "a\\ b", "a#b", "$HOME", "a$$b", "tab\tb", "it's", 'a"b', "é", "a%b", "[x]", "(y)"]
NAMES += ["a&b", "~x", "lr=0.1", "a:b"]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a copy of the bundled model, without its texts."""
    return Path(shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.txt")))


@needs_make
@pytest.mark.parametrize("name", NAMES)
def test_a_depfile_is_read_by_make(tmp_path: Path, name: str):
    (tmp_path / name).write_text("x")
    write_depfile(tmp_path / "out.d", Path("out/llmopt.json"), [Path(name), Path("other")])
    (tmp_path / "other").write_text("x")
    makefile = "out/llmopt.json:\n\t@mkdir -p out; echo built; touch $@\ninclude out.d\n"
    (tmp_path / "Makefile").write_text(makefile)

    def make() -> str:
        done = subprocess.run(["make"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "built" in make()
    assert "up to date" in make()
    later = (tmp_path / "out" / "llmopt.json").stat().st_mtime + 10
    os.utime(tmp_path / name, (later, later))
    assert "built" in make(), "a change of the file is not seen"


def test_a_depfile_that_cannot_be_written(tmp_path: Path):
    with pytest.raises(UsageError, match="cannot write the depfile"):
        write_depfile(tmp_path / "no" / "out.d", Path("x"), [])
    for name in ("a\nb", "a;b", "a=b"):  # the last alone: make would take it for a variable
        with pytest.raises(UsageError, match="no word for the name"):
            write_depfile(tmp_path / "out.d", Path("x"), [Path(name)])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, a text and what was made of them."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(TINY, folder / "model", ignore=shutil.ignore_patterns("*.txt"))
    (folder / "c.txt").write_text((TINY / "calibration.txt").read_text()[:20_000])
    build(_recipe(folder), folder / "out")
    return folder


def _recipe(folder: Path, **params: Any) -> Any:
    step = ("gptq", {"bits": 4, "group_size": 64, **params})
    return recipe(folder / "model", step, data=folder / "c.txt")


def _why(folder: Path, **params: Any) -> str | None:
    return why_outdated(make_plan(_recipe(folder, **params)), folder / "out", VERSIONS)


def test_what_is_up_to_date(built: Path, monkeypatch: pytest.MonkeyPatch):
    from llmopt.pipeline import outdated

    with monkeypatch.context() as patch:
        patch.setattr(outdated, "file_record", lambda path: pytest.fail(f"{path} was hashed"))
        assert _why(built) is None
    for name in ("model/model.safetensors", "model/tokenizer.json", "model/config.json", "c.txt", "out/config.json"):
        os.utime(built / name)  # other times, the same bytes
    assert _why(built) is None


CHANGES = {
    "model/tokenizer_config.json": "was changed",
    "model/config.json": "was changed",
    "model/generation_config.json": "was changed",
    "c.txt": "was changed",
    "out/config.json": "was changed",
    "out/model.safetensors": "was changed",
    "out/llmopt.run.json": "llmopt.run.json",
    "out/llmopt.json": "llmopt.json is damaged",
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not(built: Path, name: str):
    path = built / name
    former, times = path.read_bytes(), path.stat()
    try:
        for changed in (former + b" ", former.replace(b"e", b"f", 1) if b"e" in former else former[::-1]):
            path.write_bytes(changed)
            why = _why(built) if name != "model/config.json" else _after_config(built)
            if name == "out/llmopt.run.json":
                continue  # no hash covers it; what it says of the inputs is looked at
            if name == "out/llmopt.json" and changed == former + b" ":
                assert why is None
                continue
            assert why is not None
            assert CHANGES[name].split(" ")[-1] in why or "recipe" in why
    finally:
        path.write_bytes(former)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert _why(built) is None


def _after_config(built: Path) -> str | None:
    try:
        return _why(built)
    except LlmoptError as error:
        return f"{error.what} changed"


def test_other_parameters_versions_and_files(built: Path):
    assert _why(built, damping=0.05) == "the recipe is another"
    plan = make_plan(_recipe(built))
    assert why_outdated(plan, built / "out", {**VERSIONS, "torch": "0"}) == "versions are others"
    assert why_outdated(plan, built / "none", VERSIONS) == "there is no artifact"
    (built / "model" / "added_tokens.json").write_text("{}")
    assert _why(built) == "other files are read"
    (built / "model" / "added_tokens.json").unlink()
    (built / "out" / "config.json").rename(built / "aside")
    assert "is missing" in str(why_outdated(plan, built / "out", VERSIONS))
    (built / "aside").rename(built / "out" / "config.json")


@needs_make
@pytest.mark.slow
def test_the_example_makefile(tmp_path: Path, resident_llmopt: Path):
    """Three artifacts in parallel, nothing the second time, one of them when its calibration file changes."""
    shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.txt"))
    text = tmp_path / "c.txt"
    text.write_text((TINY / "calibration.txt").read_text()[:20_000])
    shutil.copyfile(ROOT / "examples" / "Makefile", tmp_path / "Makefile")
    options = ["MODEL=model", "CALIBRATION=c.txt", "SAMPLES=8", "LENGTH=32", "GROUP_SIZE=64"]
    # Loud, so that what is built again says why.
    options += [f"LLMOPT={resident_llmopt}", "FLAGS=--if-changed --force"]

    def make() -> tuple[str, dict[str, int]]:
        done = subprocess.run(["make", "-j2", *options], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        stamps = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "build").glob(f"*/{MANIFEST}")}
        return done.stdout + done.stderr, stamps

    _, first = make()
    assert sorted(first) == ["float-onnx", "w4-gptq", "w8-onnx-genai"]
    said, again = make()
    assert again == first
    assert "Nothing to be done" in said or "up to date" in said
    assert str(resident_llmopt) not in said

    os.utime(text)  # the same bytes: looked at, not built
    said, touched = make()
    assert touched == first
    assert said.count("is up to date") == 1

    text.write_text(text.read_text() + "The hen lays an egg.\n")
    said, changed = make()
    assert {name for name in first if changed[name] != first[name]} == {"w4-gptq"}
    assert "c.txt was changed" in said
    assert make()[1] == changed
