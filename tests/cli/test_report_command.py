"""`llmopt report` and `llmopt compare` on real artifacts."""

import json

import pytest
from helpers import build, recipe


@pytest.fixture(scope="module")
def artifacts(family, tmp_path_factory):
    root = tmp_path_factory.mktemp("artifacts")
    for bits in (4, 8):
        build(recipe(family("llama"), ("rtn", {"bits": bits, "group_size": 32})), root / f"int{bits}")
    return root


def test_a_page_is_written_and_said(llmopt, artifacts, tmp_path):
    ended = llmopt(
        "report", str(artifacts / "int4"), str(artifacts / "int8"), "-o", str(tmp_path / "new" / "both.html")
    )
    assert ended.code == 0, ended.err
    assert ended.out.startswith(f"written  {tmp_path / 'new' / 'both.html'}\n")
    assert "int8" in ended.out
    html = (tmp_path / "new" / "both.html").read_text()
    assert html.startswith("<!doctype html>")
    assert ">Side by side<" in html
    again = llmopt("report", str(artifacts / "int4"), "-o", str(tmp_path / "new" / "both.html"), "--quiet")
    assert (again.code, again.out, again.err) == (0, "", "")


def test_the_document_is_printed(llmopt, artifacts, tmp_path):
    ended = llmopt("report", str(artifacts / "int4"), "--json", "-o", str(tmp_path / "page.html"))
    document = json.loads(ended.out)
    assert document["artifacts"][0]["exports"][0]["verification"]["passed"]
    assert document["artifacts"][0]["layers"]["bits_per_weight"] == 5.0
    assert (tmp_path / "page.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ([], "no file to write given", "-o report.html"),
        (["-o", "report.txt"], "cannot tell what to write from `report.txt`", ".html"),
        (["-o", "page.html", "--eval", "missing.json"], "cannot read `missing.json`", "llmopt eval … --json"),
    ],
)
def test_bad_usage(llmopt, artifacts, arguments, message, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = llmopt("report", str(artifacts / "int4"), *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"error: {message}\n")
    assert hint in ended.err
    assert not list(tmp_path.iterdir())


def test_what_is_no_artifact(llmopt, tmp_path):
    ended = llmopt("report", str(tmp_path), "-o", str(tmp_path / "x.html"))
    assert ended.code == 2
    assert "is no artifact of llmopt" in ended.err


def test_two_artifacts_are_compared(llmopt, artifacts):
    ended = llmopt("compare", str(artifacts / "int4"), str(artifacts / "int8"))
    assert ended.code == 0, ended.err
    for heading in ("Sizes", "Passes", "Verification", "Layers", "Most different", "Weights"):
        assert f"\n{heading}\n" in ended.out
    assert "bits 4 / 8" in ended.out
    assert "model.layers.0.mlp.down_proj.weight" in ended.out


def test_the_comparison_is_json(llmopt, artifacts):
    ended = llmopt("compare", str(artifacts / "int4"), str(artifacts / "int8"), "--json", "--quiet")
    document = json.loads(ended.out)
    assert document["weights"][0]["equal"] is False
    assert document["artifacts"] == [str(artifacts / "int4"), str(artifacts / "int8")]
