"""Data sets behind `hf:`, from local folders and files; the hub itself is never asked."""

from __future__ import annotations

import json

import pytest
from llmopt.calibration.hub import HubSpec, hub_records, parse_hub_spec
from llmopt.calibration.samples import load_samples
from llmopt.calibration.source import open_source
from llmopt.core.errors import ExitCode, LlmoptError, UsageError
from llmopt.core.recipe import CalibrationSpec


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path):
    """A data set of two splits."""
    path = tmp_path / "data"
    path.mkdir()
    for split in ("train", "test"):
        rows = [{"id": n, "text": f"{split} text number {n}" if n % 5 else ""} for n in range(40)]
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(spec, tokenizer, column=None):
    return [document.text for document in open_source(spec, column).documents(tokenizer, running=True)]


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("hf:wikitext", HubSpec("wikitext", None, None, local=False)),
        ("hf:org/name", HubSpec("org/name", None, None, local=False)),
        ("hf:org/name/config:test", HubSpec("org/name", "config", "test", local=False)),
        ("hf:org/name:train[:10%]", HubSpec("org/name", None, "train[:10%]", local=False)),
    ],
)
def test_spec(spec, parsed):
    assert parse_hub_spec(spec) == parsed


@pytest.mark.parametrize("spec", ["hf:", "hf:a/b/c/d", "hf:a//b", "hf:a b", "hf:a:b:c", "hf:a:"])
def test_spec_refused(spec):
    with pytest.raises(UsageError, match=f"cannot read `{spec}` as a data set") as caught:
        open_source(spec)
    assert caught.value.hint.startswith("write hf:NAME[/CONFIG][:SPLIT]")


def test_local_folder(folder, tokenizer):
    assert texts("hf:./data", tokenizer)[:2] == ["", "train text number 1"]
    assert texts("hf:data:test", tokenizer)[1] == "test text number 1"
    assert texts(f"hf:{folder}:train[:3]", tokenizer) == ["", "train text number 1", "train text number 2"]
    assert texts("hf:./data/test.jsonl", tokenizer, "text")[1] == "test text number 1"


def test_parquet_file_and_saved_data_set(folder, tokenizer, tmp_path):
    import datasets

    data = datasets.Dataset.from_dict({"n": [1, 2], "body": ["one", "two"]})
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"valid": data}).save_to_disk(tmp_path / "both")
    for spec in ("hf:./a.parquet", "hf:./saved", "hf:./both:valid", "hf:./both"):
        assert texts(spec, tokenizer) == ["one", "two"], spec


def test_samples(folder, tokenizer, reporter):
    spec = CalibrationSpec(data="hf:./data", samples=4, length=16)
    samples = load_samples(spec, tokenizer, seed=0, held_out=2, reporter=reporter)
    assert samples.documents == 32
    assert samples.source == "hf:./data"
    assert reporter.notes == [
        "calibration: 4 samples, 64 tokens from 32 documents (hf:./data)",
        "calibration: left out 8 empty texts",
    ]
    assert samples == load_samples(spec, tokenizer, seed=0, held_out=2, reporter=reporter)
    other = CalibrationSpec(data="hf:./data:test", samples=4, length=16)
    assert load_samples(other, tokenizer, seed=0, reporter=reporter).sha256 != samples.sha256


def test_reading_stops_when_there_is_enough(tmp_path, tokenizer, reporter):
    rows = "".join(json.dumps({"text": f"text number {n}"}) + "\n" for n in range(1000))
    (tmp_path / "long.jsonl").write_text(rows, encoding="utf-8")
    spec = CalibrationSpec(data="hf:./long.jsonl", samples=5, length=64, packing=False)
    samples = load_samples(spec, tokenizer, seed=0, reporter=reporter)
    assert samples.documents == 80
    assert reporter.notes[1] == "calibration: stopped reading after 80 documents, which are enough to draw from"


@pytest.mark.parametrize(
    ("spec", "what", "where", "hint"),
    [
        ("hf:./data:tests", "no split `tests` in `hf:./data:tests`", "splits: train, test", "did you mean `test`?"),
        ("hf:./dta", "no file or folder `dta`", "calibration data `hf:./dta`", "check the path"),
        ("hf:./data/a.bin", "`data/a.bin` is of a kind that `datasets` is not asked to read", None, "known: .json,"),
        ("hf:./hollow", "no data set `hollow`", "The directory at", "write the full name"),
    ],
)
def test_refused(folder, tokenizer, tmp_path, spec, what, where, hint):
    (folder / "a.bin").touch()
    (tmp_path / "hollow").mkdir()
    with pytest.raises(UsageError) as caught:
        texts(spec, tokenizer)
    error = caught.value
    assert error.what == what
    assert (error.where or "").startswith(where or "")
    assert error.hint.startswith(hint)


def test_several_splits_and_none_named(folder, tokenizer):
    (folder / "train.jsonl").rename(folder / "validation.jsonl")
    with pytest.raises(UsageError, match="has several splits") as caught:
        texts("hf:./data", tokenizer)
    assert caught.value.hint == "name one: hf:./data:SPLIT"


def test_damaged_data(tmp_path, tokenizer):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is none")
    with pytest.raises(LlmoptError, match="cannot read data set"):
        texts("hf:./a.parquet", tokenizer)


def test_unknown_config(folder, monkeypatch):
    import datasets

    def missing(*args, **options):
        raise ValueError("BuilderConfig 'nope' not found. Available: ['wikitext-2-raw-v1']\nmore")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(LlmoptError, match="cannot read data set `org/name`") as caught:
        next(hub_records("hf:org/name/nope"))
    assert caught.value.where == "BuilderConfig 'nope' not found. Available: ['wikitext-2-raw-v1']"


def test_offline(tokenizer):
    with pytest.raises(LlmoptError, match="cannot reach data set `org/name`") as caught:
        texts("hf:org/name", tokenizer)
    assert caught.value.exit_code is ExitCode.FAILED
    assert caught.value.where == "HF_HUB_OFFLINE is set, and the data set is not in the cache"
