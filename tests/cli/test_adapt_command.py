"""`llmopt adapt`: the recipe that merging builds, and what is refused."""

import pytest


def test_merging_is_a_recipe(llmopt, pipeline):
    ended = llmopt(
        *("adapt", "merge", "tiny", "-o", "out", "--adapter", "one", "--adapter", "two"),
        *("--weight", "0.5", "--weight", "1.5", "--export", "onnx"),
    )
    assert ended.code == 0, ended.err
    (step,) = pipeline["recipe"].passes
    assert (step.name, step.params) == ("merge-adapter", {"adapters": ["one", "two"], "weights": [0.5, 1.5]})
    assert [one.name for one in pipeline["recipe"].exports] == ["onnx"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["blend", "tiny", "-o", "out"], "unknown action `blend`"),
        (["merge", "tiny", "-o", "out"], "no adapter to merge"),
        (["merge", "tiny", "-o", "out", "--adapter", "a", "--base", "b"], "--base does not apply"),
        (["extract", "tiny", "-o", "out"], "extract needs the base"),
        (["extract", "tiny", "--base", "b"], "no output folder"),
        (["merge", "tiny", "-o", "out", "--adapter", "a", "--rank", "16"], "--rank does not apply to merge"),
        (["extract", "tiny", "-o", "out", "--base", "b", "--adapter", "a"], "takes --base and --rank only"),
        (["extract", "tiny", "-o", "out", "--base", "b", "--rank", "0"], "--rank"),
        (["extract", "./no-such", "-o", "out", "--base", "./neither"], "no model at"),
    ],
)
def test_refusals(llmopt, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = llmopt("adapt", *arguments)
    assert ended.code == 2
    assert said in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option",
    ["--gate=size_ratio<=1", "--junit=x.xml", "--depfile=x.d", "--if-changed", "--threads=2", "--no-cache"],
)
def test_extract_ignores_no_option_of_a_build(llmopt, option):
    ended = llmopt("adapt", "extract", "tuned", "--base", "base", "-o", "out", option)
    assert ended.code == 2
    assert "extract takes --base and --rank only" in ended.err
