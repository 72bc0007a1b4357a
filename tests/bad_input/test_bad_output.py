"""Outputs that cannot or must not be written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from broken import TINY, tree
from llmopt.core.manifest import RUN

ARGUMENTS = ("quantize", TINY, "--group-size", "64")


@pytest.fixture
def below(shell):
    """Return a shell with a plain file, a folder of someone else's, and a link that leads nowhere."""
    (shell.folder / "file").write_text("mine")
    (shell.folder / "folder").mkdir()
    (shell.folder / "folder" / "notes.txt").write_text("mine too")
    (shell.folder / "link").symlink_to("nowhere")
    return shell


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
@pytest.mark.parametrize(
    ("output", "what", "hint"),
    [
        ("file", "`file` is not a folder", "give another one with -o"),
        ("file/out", "cannot write to `file/out`", "give a folder you may write to"),
        ("file/a/b", "cannot write to `file/a/b`", "give a folder you may write to"),
        ("folder", "`folder` exists and is no artifact of llmopt", "give another folder with -o"),
        ("link", "`link` is not a folder", "give another one with -o"),
        (".", "`.` is the folder you are in", "give the name of a folder in it"),
        ("..", "`..` is the folder you are in, or one above it", "give the name of a folder in it"),
        ("folder/..", "`folder/..` is the folder you are in", "give the name of a folder in it"),
        ("/", "`/` is the folder you are in, or one above it", "give the name of a folder in it"),
        ("x" * 300, "cannot write to `xxx", "give a folder you may write to"),
        ("/proc/out", "cannot write to `/proc`", "give a folder you may write to"),
    ],
)
def test_refused(below, force, output, what, hint):
    if output.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    below.refuses(*ARGUMENTS, "-o", output, *force, code=2, what=what, hint=hint)


def test_a_folder_without_write_permission(shell):
    (shell.folder / "closed").mkdir(mode=0o555)
    if os.access("closed", os.W_OK):
        pytest.skip("permissions do not bind this user")
    shell.refuses(*ARGUMENTS, "-o", "closed/out", code=2, what="cannot write to `closed/out`", hint="may write to")


def test_none_given(shell):
    shell.refuses(*ARGUMENTS, code=2, what="no output folder given", hint="-o DIR, or use --dry-run")


def test_an_artifact_is_replaced_only_when_asked(shell, artifact):
    assert shell.run(*ARGUMENTS, "-o", "out").code == 0
    same, other = ({name: data for name, data in tree(one).items() if name != RUN} for one in (Path("out"), artifact))
    assert same == other  # and the same recipe gives the same bytes
    shell.refuses(*ARGUMENTS, "-o", "out", code=2, what="`out` exists already", hint="replace it with --force")
    before = (Path("out") / "model.safetensors").read_bytes()
    assert shell.run(*ARGUMENTS, "--scheme", "w8a16", "-o", "out", "--force").code == 0
    assert (Path("out") / "model.safetensors").read_bytes() != before
    assert [path.name for path in Path().iterdir()] == ["out"]


def test_an_empty_folder_is_taken(shell):
    (shell.folder / "out").mkdir()
    assert shell.run(*ARGUMENTS, "-o", "out").code == 0
    assert shell.run("verify", "out").code == 0


def test_folders_above_the_output_are_made_and_removed_again(shell, model):
    assert shell.run("quantize", model, "--group-size", "64", "-o", "a/b/out").code == 0
    assert (shell.folder / "a" / "b" / "out" / "llmopt.json").is_file()
    (model / "model.safetensors").write_bytes(b"")
    what = "model.safetensors is damaged"
    shell.refuses("quantize", model, "--group-size", "64", "-o", "c/d/out", code=1, what=what, hint="fetch")


@pytest.mark.parametrize("named", ["plain", "plain/../plain", "."])
def test_the_model_that_is_read_is_not_replaced(shell, named):
    assert shell.run("export", TINY, "-o", "plain").code == 0
    if named == ".":
        os.chdir("plain")
    shell.folder = Path("plain").absolute() if named != "." else Path.cwd()
    ended = shell.refuses("quantize", named, "--group-size", "64", "-o", named, "--force", code=2, what="`", hint="-o")
    assert "holds what is read" in ended.err or "is the folder you are in" in ended.err


def test_the_calibration_data_that_is_read_is_not_replaced(shell):
    assert shell.run(*ARGUMENTS, "-o", "out").code == 0
    text = shell.folder / "out" / "mine.txt"
    text.write_bytes((TINY / "calibration.txt").read_bytes())
    options = ("--calibration", text, "--samples", "4", "--length", "32", "-o", "out", "--force")
    shell.refuses(*ARGUMENTS, *options, code=2, what="`out` holds what is read", hint="give another folder with -o")


def test_the_recipe_that_is_read_is_not_replaced(shell):
    assert shell.run(*ARGUMENTS, "-o", "out", "--save-recipe", "recipe.yaml").code == 0
    Path("recipe.yaml").rename("out/recipe.yaml")
    arguments = ("run", "out/recipe.yaml", "-o", "out", "--force")
    shell.refuses(*arguments, code=2, what="`out` holds what is read", hint="give another folder with -o")


@pytest.mark.parametrize("place", ["nowhere/recipe.yaml", "folder"])
def test_a_recipe_that_cannot_be_saved(below, place):
    options = ("--save-recipe", place, "-o", "out")
    below.refuses(*ARGUMENTS, *options, code=2, what=f"cannot write the recipe to `{place}`", hint="--save-recipe")


@pytest.mark.parametrize("name", ["recipe.json", "config.json"])
def test_a_recipe_that_would_be_read_as_a_part_of_the_model(shell, name):
    shutil.copytree(TINY, "model")
    before = tree(shell.folder)
    arguments = ("quantize", "model", "--group-size", "64", "-o", "out", "--save-recipe", f"model/{name}")
    shell.refuses(*arguments, code=2, what=f"`model/{name}` would be read", hint="write it to another folder")
    assert tree(shell.folder) == before


def test_a_dry_run_writes_nothing(shell):
    before = tree(shell.folder)
    assert shell.run(*ARGUMENTS, "-o", "out", "--dry-run").code == 0
    assert tree(shell.folder) == before


def test_refusing_an_output_imports_nothing_heavy(shell):
    (shell.folder / "out").mkdir()
    (shell.folder / "out" / "mine").write_text("")
    program = "import sys; from llmopt.__main__ import main; code = main(sys.argv[1:]); print('torch' in sys.modules)"
    arguments = [sys.executable, "-c", program, *map(str, ARGUMENTS), "-o", "out"]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"
