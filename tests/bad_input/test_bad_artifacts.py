"""Artifacts that were tampered with, and folders that are none: verify, eval, bench, inspect."""

import json
import shutil
from pathlib import Path

import pytest
from broken import TINY, reconfigure

HELDOUT = ("--data", TINY / "heldout.txt")


@pytest.fixture
def made(shell, artifact):
    """Return a copy of the artifact, to be tampered with."""
    return Path(shutil.copytree(artifact, "made"))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


FILES = ["model.safetensors", "config.json", "tokenizer.json", "llmopt.reference.json"]


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_byte(shell, made, file):
    flip(made / file)
    where = "SHA-256 "
    shell.refuses("verify", made, code=3, what=f"`made/{file}` was changed", where=where, hint="build the artifact")


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file(shell, made, file):
    (made / file).unlink()
    shell.refuses("verify", made, "--json", code=3, what=f"`made/{file}` is missing", hint="build the artifact again")


def test_an_untouched_one_verifies(shell, made):
    ended = shell.run("verify", made, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["exports"][0]["verification"]["passed"]


@pytest.mark.parametrize("command", [("verify",), ("inspect",), ("eval", *HELDOUT)], ids=lambda command: command[0])
@pytest.mark.parametrize("text", ["", "{}", "no json", "[]"])
def test_a_damaged_manifest(shell, made, command, text):
    (made / "llmopt.json").write_text(text)
    shell.refuses(
        command[0], made, *command[1:], code=1, what="llmopt.json is damaged", hint="build the artifact again"
    )


def test_answers_that_are_not_the_models(shell, made):
    """The files are what the manifest says, but another model answers."""
    from llmopt.pipeline.output import file_record

    kept = json.loads((made / "llmopt.reference.json").read_text())
    kept["batches"][0]["outputs"]["logits"]["log_probabilities"][0][3][0] -= 1
    (made / "llmopt.reference.json").write_text(json.dumps(kept))
    manifest = json.loads((made / "llmopt.json").read_text())
    record = file_record(made / "llmopt.reference.json")
    manifest["files"]["llmopt.reference.json"] = {"bytes": record.bytes, "sha256": record.sha256}
    (made / "llmopt.json").write_text(json.dumps(manifest))
    what = "`made` no longer gives the answers of the model that was exported"
    shell.refuses("verify", made, code=3, what=what, where="max difference 1, ", hint="compare `versions`")


@pytest.mark.parametrize(
    ("path", "what", "hint"),
    [
        ("nothing", "no folder at `nothing`", "give a model folder or an artifact"),
        ("maed", "no folder at `maed`", "did you mean `made`?"),
        (TINY, "is no artifact of llmopt", "`llmopt eval` and `llmopt bench` take any model folder"),
        (TINY / "config.json", "is a file, not a folder", "the folder it lies in"),
    ],
)
def test_verify_takes_artifacts_only(shell, made, path, what, hint):
    shell.refuses("verify", path, code=2, what=what, hint=hint)


@pytest.mark.parametrize("command", ["eval", "bench", "inspect"])
@pytest.mark.parametrize(
    ("path", "code", "what", "hint"),
    [
        ("nothing", 2, "no folder at `nothing`", "give a model folder or an artifact"),
        ("foreign", 2, "`foreign`", "give a model folder or an artifact of llmopt"),
        ("notes.txt", 2, "`notes.txt` is a file, not a folder", "the folder it lies in"),
        ("org/nothing", 1, "no model at `org/nothing`", "hub id such as org/name"),
    ],
)
def test_what_nothing_opens(shell, command, path, code, what, hint):
    (shell.folder / "foreign").mkdir()
    (shell.folder / "foreign" / "data.bin").write_bytes(b"x")
    (shell.folder / "notes.txt").write_text("x")
    options = HELDOUT if command == "eval" else ()
    shell.refuses(command, path, *options, code=code, what=what, hint=hint)


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_several_exports_need_a_choice(shell, made, command):
    manifest = json.loads((made / "llmopt.json").read_text())
    manifest["exports"][0]["directory"] = "safetensors"
    (made / "llmopt.json").write_text(json.dumps(manifest))
    options = HELDOUT if command == "eval" else ()
    what = "`made` holds several exports"
    shell.refuses(command, made, *options, code=2, what=what, hint="give one of them: made/safetensors")


def test_bench_measures_nothing_when_the_other_is_not_there(shell):
    ended = shell.refuses("bench", TINY, "--against", "nothing", code=2, what="no folder at `nothing`", hint="give a ")
    assert "measuring" not in ended.err


def test_bench_of_a_model_that_does_not_load(shell, model):
    (model / "model.safetensors").write_bytes(b"")
    shell.refuses("bench", model, "--repeats", "1", code=1, what="`model` cannot be measured", hint="")


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        (("--data", "nothing.txt"), "no file `nothing.txt`", "name a file of kind .txt"),
        ((*HELDOUT, "--length", "512"), "a window of 513 tokens is longer than the context", "--length 511 or less"),
        ((*HELDOUT, "--column", "text"), "no column `text`", "leave --column out"),
        ((), "missing --data", "`llmopt eval --help`"),
        ((*HELDOUT, "--length", "1"), "bad value for --length", "`llmopt eval --help`"),
    ],
)
def test_eval_on_data_that_cannot_be_used(shell, options, what, hint):
    shell.refuses("eval", TINY, *options, code=2, what=what, hint=hint)


def test_eval_on_too_little_text(shell):
    (shell.folder / "short.txt").write_text("")
    shell.refuses(
        "eval", TINY, "--data", "short.txt", code=1, what="`short.txt` is empty", hint="name a file with text"
    )


def test_eval_of_a_model_that_is_not_causal(shell, family):
    folder = family("bert")
    perplexity = ("--task", "perplexity")
    shell.refuses(
        "eval", folder, *HELDOUT, *perplexity, code=2, what="cannot be measured at perplexity", hint="classify"
    )


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_models_of_other_kinds_verify_again(shell, family, name):
    assert shell.run("export", family(name), "-o", "out").code == 0
    ended = shell.run("verify", "out", "--json")
    assert ended.code == 0, ended.err
    assert (json.loads(ended.out)["exports"][0]["verification"] is None) == (name == "vit")  # pictures are not kept


def test_eval_with_the_tokenizer_of_another_model(shell, model):
    for path in model.glob("tokenizer*"):
        path.unlink()
    what = "no tokenizer can be loaded from `model`"
    shell.refuses("eval", model, *HELDOUT, code=2, what=what, hint="put tokenizer.json")


def test_eval_says_when_the_source_is_gone(shell, model):
    assert shell.run("quantize", model, "--group-size", "64", "-o", "made").code == 0
    shutil.rmtree(model)
    ended = shell.run("eval", "made", *HELDOUT, "--length", "64", "--limit", "2", "--json")
    assert ended.code == 0, ended.err
    assert "no comparison with the source: `model` is not here" in ended.err
    assert "source" not in json.loads(ended.out)


def test_inspect_of_a_damaged_model(shell, model):
    (model / "model.safetensors").write_bytes(b"x")
    shell.refuses("inspect", model, code=1, what="model.safetensors is damaged", hint="fetch or save it again")
    reconfigure(model, architectures="Llama")
    shell.refuses("inspect", model, code=1, what="", hint="")
