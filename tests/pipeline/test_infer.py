"""`llmopt infer`: rows in the order of the texts, whatever is computed together, whatever happens on the way."""

from __future__ import annotations

import csv
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from families import save_head, save_sentence_folder
from helpers import build, recipe
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.core.progress import Silent
from llmopt.models.text import load_tokenizer
from llmopt.pipeline import text_inference as module
from llmopt.pipeline.batching import BatchingParams
from llmopt.pipeline.costs import measure_costs
from llmopt.pipeline.infer import infer
from llmopt.pipeline.inference import InferOptions
from llmopt.runtimes.onnxruntime_ import OnnxRuntime, OnnxSession

if TYPE_CHECKING:
    from pathlib import Path

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "5", "mice"]
TEXTS = [" ".join(WORDS[: 1 + (7 * n) % 11]) + f" {n}" for n in range(23)]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Return the ONNX artifact of a tiny model, made once: `artifacts("bert", "BertForTokenClassification")`."""
    made = {}

    def artifact(name, architecture, **changes):
        key = (name, architecture, repr(changes))
        if key not in made:
            root = tmp_path_factory.mktemp(architecture)
            if architecture == "sentence":
                save_sentence_folder(root / "model", **changes)
            else:
                save_head(name, architecture, root / "model", **changes)
            build(recipe(root / "model", export=("onnx", {})), root / "out")
            made[key] = root / "out"
        return made[key]

    return artifact


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(TEXTS)))
    return path


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)

    def warn(self, message):
        self.notes.append(message)


def run(artifact: Path, data: Path, output: Path, *, reporter: Any = None, force: bool = False, **options: Any):
    batching = {name: options.pop(name) for name in ("batching", "batch_size", "max_batch_tokens") if name in options}
    options = {"threads": 1, **options}
    chosen = InferOptions(**options, batching=BatchingParams(**batching) if batching else None)
    report = infer(
        str(artifact), data=str(data), output=output, options=chosen, force=force, reporter=reporter or Heard()
    )
    return report, [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def one_by_one(artifact, texts):
    """Return the outputs of the graph for each text alone."""
    tokenizer, session = load_tokenizer(artifact), OnnxRuntime().open(artifact, threads=1)
    return [session.outputs({"input_ids": np.array([tokenizer(text)["input_ids"]])}) for text in texts]


@pytest.mark.parametrize(
    "batching",
    [
        {},
        {"batching": "fixed", "batch_size": 4},
        {"batching": "sorted", "batch_size": 5},
        {"batching": "tokens", "max_batch_tokens": 40},
        {"batching": "dp", "batch_size": 6},
    ],
    ids=lambda one: one.get("batching", "default"),
)
def test_embeddings_come_in_the_order_of_the_texts(artifacts, texts, tmp_path, monkeypatch, batching):
    monkeypatch.setattr(module, "WINDOW", 9)
    artifact = artifacts("bert", "sentence")
    report, rows = run(artifact, texts, tmp_path / "out.jsonl", **batching)
    assert [row["index"] for row in rows] == list(range(len(TEXTS)))
    for row, outputs in zip(rows, one_by_one(artifact, TEXTS), strict=True):
        assert np.abs(np.array(row["embedding"]) - outputs["sentence_embedding"][0]).max() < 1e-5
    tokenizer = load_tokenizer(artifact)
    assert report["tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    assert report["texts"] == len(TEXTS)
    assert report["padded_tokens"] >= report["tokens"]
    assert report["fill_ratio"] == report["tokens"] / report["padded_tokens"]
    assert report["p50_batch_seconds"] <= report["p95_batch_seconds"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "texts.jsonl"]


@pytest.mark.parametrize("export", ["onnx", "openvino"])
def test_batches_side_by_side_give_the_same(texts, tmp_path, export):
    """Three batches at a time, on three threads; one thread computes each, as when there is one alone."""
    save_sentence_folder(tmp_path / "model")
    build(recipe(tmp_path / "model", export=(export, {})), tmp_path / "out")
    small = {"batching": "sorted", "batch_size": 2}
    one, expected = run(tmp_path / "out", texts, tmp_path / "one.jsonl", **small)
    three, rows = run(tmp_path / "out", texts, tmp_path / "three.jsonl", threads=3, **small)
    assert rows == expected
    assert [report["parallel_batches"] for report in (one, three)] == [1, 3]
    assert three["batches"] == one["batches"] == 12


def test_an_error_beside_others_ends_the_run(artifacts, texts, tmp_path, monkeypatch):
    def outputs(self, inputs):
        raise LlmoptError("no more")

    monkeypatch.setattr(OnnxSession, "outputs", outputs)
    with pytest.raises(LlmoptError, match="no more"):
        run(artifacts("bert", "sentence"), texts, tmp_path / "out.jsonl", threads=2, batch_size=2)
    assert not (tmp_path / "out.jsonl").exists()


def test_more_at_a_time_than_there_can_be(artifacts, texts, tmp_path):
    with pytest.raises(UsageError, match="more batches at a time than threads") as refused:
        run(artifacts("bert", "sentence"), texts, tmp_path / "out.jsonl", threads=2, parallel=3)
    assert refused.value.hint == "use --parallel 2"
    with pytest.raises(UsageError, match="side by side"):
        run(artifacts("llama", "LlamaForCausalLM"), texts, tmp_path / "out.jsonl", threads=2, parallel=2)
    save_sentence_folder(tmp_path / "model")
    with pytest.raises(UsageError, match="side by side") as refused:
        run(tmp_path / "model", texts, tmp_path / "out.jsonl", threads=2, parallel=2)
    assert "transformers computes one at a time" in refused.value.where


def test_every_kind_of_file_gives_the_same(artifacts, texts, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    artifact = artifacts("bert", "sentence")
    (tmp_path / "a.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["n", "body"], *([n, text] for n, text in enumerate(TEXTS))])
    parquet.write_table(pa.table({"body": TEXTS, "n": TEXTS}), tmp_path / "a.parquet")
    _, expected = run(artifact, texts, tmp_path / "out.jsonl")
    for name, column in (("a.txt", None), ("a.csv", "body"), ("a.parquet", "body")):
        assert run(artifact, tmp_path / name, tmp_path / f"{name}.jsonl", column=column)[1] == expected


def test_class_scores(artifacts, texts, tmp_path):
    artifact = artifacts("bert", "BertForSequenceClassification", id2label={0: "no", 1: "maybe", 2: "yes"})
    _, rows = run(artifact, texts, tmp_path / "out.jsonl")
    for row, outputs in zip(rows, one_by_one(artifact, TEXTS), strict=True):
        raised = np.exp(outputs["logits"][0])
        assert list(row["scores"]) == ["no", "maybe", "yes"]
        assert np.abs(np.array(list(row["scores"].values())) - raised / raised.sum()).max() < 1e-5
        assert row["label"] == ["no", "maybe", "yes"][int(raised.argmax())]
        assert row["score"] == max(row["scores"].values())


def test_labels_that_do_not_exclude_each_other(artifacts, texts, tmp_path):
    changes = {"id2label": {0: "a", 1: "b"}, "problem_type": "multi_label_classification"}
    artifact = artifacts("bert", "BertForSequenceClassification", **changes)
    _, rows = run(artifact, texts, tmp_path / "out.jsonl")
    for row, outputs in zip(rows, one_by_one(artifact, TEXTS), strict=True):
        assert np.abs(np.array(list(row["scores"].values())) - 1 / (1 + np.exp(-outputs["logits"][0]))).max() < 1e-5


def test_a_model_folder_in_transformers(texts, tmp_path):
    """Another runtime, and a model without token types whose tokenizer makes them."""
    folder = save_head("distilbert", "DistilBertForSequenceClassification", tmp_path / "model")
    path = folder / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": names}))
    assert "token_type_ids" in load_tokenizer(folder)("fox")
    report, rows = run(folder, texts, tmp_path / "out.jsonl")
    assert report["runtime"].startswith("transformers ")
    build(recipe(folder, export=("onnx", {})), tmp_path / "onnx")
    _, expected = run(tmp_path / "onnx", texts, tmp_path / "expected.jsonl")
    for row, other in zip(rows, expected, strict=True):
        assert row["scores"] == pytest.approx(other["scores"], abs=1e-5)


def test_pairs(artifacts, tmp_path):
    artifact = artifacts("bert", "BertForSequenceClassification", id2label={0: "no", 1: "maybe", 2: "yes"})
    path = tmp_path / "pairs.jsonl"
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    path.write_text("".join(json.dumps({"text": a, "other": b}) + "\n" for a, b in pairs))
    _, rows = run(artifact, path, tmp_path / "out.jsonl", pair_column="other")
    tokenizer, session = load_tokenizer(artifact), OnnxRuntime().open(artifact, threads=1)
    for row, (a, b) in zip(rows, pairs, strict=True):
        made = tokenizer(a, b)
        inputs = {name: np.array([made[name]]) for name in ("input_ids", "token_type_ids") if name in made}
        raised = np.exp(session.outputs(inputs)["logits"][0])
        assert np.abs(np.array(list(row["scores"].values())) - raised / raised.sum()).max() < 1e-5


def test_token_classes_stand_where_they_are_in_the_text(artifacts, texts, tmp_path):
    artifact = artifacts("bert", "BertForTokenClassification", num_labels=4)
    _, rows = run(artifact, texts, tmp_path / "out.jsonl")
    tokenizer = load_tokenizer(artifact)
    for row, text, outputs in zip(rows, TEXTS, one_by_one(artifact, TEXTS), strict=True):
        assert "".join(text[token["start"] : token["end"]] for token in row["tokens"]) == text
        names = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        assert [token["token"] for token in row["tokens"]] == names[1:]  # the first is <s>
        labels = [f"LABEL_{label}" for label in outputs["logits"][0].argmax(-1)]
        assert [token["label"] for token in row["tokens"]] == labels[1:]
        assert all(0.25 <= token["score"] <= 1 for token in row["tokens"])


@pytest.mark.parametrize(
    ("name", "architecture"), [("llama", "LlamaForCausalLM"), ("t5", "T5ForConditionalGeneration")]
)
def test_text_is_generated(artifacts, tmp_path, name, architecture):
    artifact = artifacts(name, architecture)
    (tmp_path / "a.txt").write_text("the quick\n\nbrown fox jumps\n")
    report, rows = run(artifact, tmp_path / "a.txt", tmp_path / "out.jsonl", max_new_tokens=6)
    tokenizer, session = load_tokenizer(artifact), OnnxRuntime().open(artifact, threads=1)
    for row, text in zip(rows, ["the quick", "", "brown fox jumps"], strict=True):
        made = session.generate(tokenizer(text)["input_ids"], 6)
        made = made[: made.index(2)] if 2 in made else made
        assert row["text"] == tokenizer.decode(made, skip_special_tokens=True)
    assert report["padded_tokens"] == report["tokens"]


def test_long_and_empty_texts(artifacts, tmp_path):
    artifact = artifacts("bert", "sentence")  # its max_seq_length is 64
    (tmp_path / "a.txt").write_text(f"{'fox ' * 200}\n\nfox\n")
    heard = Heard()
    report, rows = run(artifact, tmp_path / "a.txt", tmp_path / "out.jsonl", reporter=heard)
    assert report["truncated_texts"] == 1
    assert any("1 of 3 texts were longer" in note for note in heard.notes)
    assert report["tokens"] == 64 + 1 + len(load_tokenizer(artifact)("fox")["input_ids"])
    short, _ = run(artifact, tmp_path / "a.txt", tmp_path / "short.jsonl", max_length=8)
    assert short["tokens"] < report["tokens"]
    assert len(rows) == 3
    assert all(len(row["embedding"]) == 64 for row in rows)


def test_a_text_without_any_token_has_an_empty_row(artifacts, tmp_path):
    artifact = tmp_path / "copy"
    shutil.copytree(artifacts("bert", "sentence"), artifact)
    made = json.loads((artifact / "tokenizer.json").read_text())
    made["post_processor"] = None  # no <s>
    (artifact / "tokenizer.json").write_text(json.dumps(made))
    (tmp_path / "a.txt").write_text("\nfox\n\n")
    report, rows = run(artifact, tmp_path / "a.txt", tmp_path / "out.jsonl", batching="dp")
    assert report["empty_texts"] == 2
    assert [row["embedding"] is None for row in rows] == [True, False, True]


def interrupted_after(monkeypatch, batches):
    """Let Ctrl-C come in a later batch."""
    plain, count = OnnxSession.outputs, [0]

    def outputs(self, inputs):
        count[0] += 1
        if count[0] > batches:
            raise KeyboardInterrupt
        return plain(self, inputs)

    monkeypatch.setattr(OnnxSession, "outputs", outputs)


@pytest.fixture
def killed(artifacts, texts, tmp_path, monkeypatch):
    """Leave a run that was interrupted in its third window of four texts."""
    artifact = artifacts("bert", "sentence")
    monkeypatch.setattr(module, "WINDOW", 4)
    with monkeypatch.context() as patch:
        interrupted_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run(artifact, texts, tmp_path / "out.jsonl", batching="fixed", batch_size=2)
    assert not (tmp_path / "out.jsonl").exists()
    return artifact


def test_a_killed_run_goes_on_where_it_was(killed, texts, tmp_path):
    _, expected = run(killed, texts, tmp_path / "whole.jsonl", batching="fixed", batch_size=2)
    partial = tmp_path / "out.jsonl.partial"
    with partial.open("a") as file:
        file.write('{"index": 8, "embed')  # a window that was cut off
    heard = Heard()
    report, rows = run(killed, texts, tmp_path / "out.jsonl", batching="fixed", batch_size=2, reporter=heard)
    assert report["resumed_texts"] == 8
    assert (report["texts"], report["batches"]) == (23, 12)
    assert heard.notes == ["8 of 23 texts were computed by an earlier run"]
    assert rows == expected
    assert not partial.exists()
    assert not (tmp_path / "out.jsonl.partial.json").exists()


def test_the_output_may_lie_in_the_artifact(artifacts, texts, tmp_path, monkeypatch):
    artifact = tmp_path / "copy"
    shutil.copytree(artifacts("bert", "sentence"), artifact)
    monkeypatch.setattr(module, "WINDOW", 8)
    with monkeypatch.context() as patch:
        interrupted_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run(artifact, texts, artifact / "out.jsonl", batching="fixed", batch_size=8)
    report, _ = run(artifact, texts, artifact / "out.jsonl", batching="fixed", batch_size=8)
    assert report["resumed_texts"] == 8


@pytest.mark.parametrize("changed", ["options", "input", "artifact", "journal", "rows"])
def test_what_was_made_from_something_else_is_not_gone_on_with(killed, texts, tmp_path, changed):
    artifact, options = killed, {"batching": "fixed", "batch_size": 2}
    if changed == "options":
        options["max_length"] = 9
    elif changed == "input":
        texts.write_text(texts.read_text().replace("quick", "slow"))
    elif changed == "artifact":
        artifact = tmp_path / "other"
        shutil.copytree(killed, artifact)
        (artifact / "more.txt").write_text("x")
    elif changed == "journal":
        (tmp_path / "out.jsonl.partial.json").write_text("{")
    else:
        (tmp_path / "out.jsonl.partial").write_text("")
    heard = Heard()
    report, rows = run(artifact, texts, tmp_path / "out.jsonl", reporter=heard, **options)
    assert report["resumed_texts"] == 0
    assert any("begun anew" in note for note in heard.notes)
    assert [row["index"] for row in rows] == list(range(23))


def test_a_file_that_exists_is_replaced_when_all_is_done(artifacts, texts, tmp_path, monkeypatch):
    artifact, output = artifacts("bert", "sentence"), tmp_path / "out.jsonl"
    output.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        run(artifact, texts, output)
    with monkeypatch.context() as patch:
        interrupted_after(patch, 0)
        with pytest.raises(KeyboardInterrupt):
            run(artifact, texts, output, force=True)
    assert output.read_text() == "mine"
    assert len(run(artifact, texts, output, force=True)[1]) == 23


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("name", "content", "options", "says"),
    [
        ("a.txt", b"", {}, "is empty"),
        ("a.jsonl", b"\n\n", {}, "holds no texts"),
        ("a.jsonl", b'{"body": "x", "title": "y"}\n', {}, "cannot tell which column"),
        ("a.jsonl", b'{"body": "x"}\n', {"column": "text"}, "no column `text`"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}\n', {}, "no `text` in line 2"),
        ("a.jsonl", b'{"text": 5}\n', {}, "is no text"),
        ("a.jsonl", b'{"text": "x"}\n', {"pair_column": "other"}, "no column `other`"),
        ("a.txt", b"x\n\xff\xfe\n", {}, "is not UTF-8"),
        ("a.pdf", b"x", {}, "unknown kind of data"),
        ("a.txt", b"x\n", {"max_length": 1000}, "--max-length 1000 is more"),
        ("a.txt", b"x\n", {"max_new_tokens": 5}, "generates no text"),
        ("a.txt", b"x\n", {"batching": "fixed", "max_batch_tokens": 5}, "--max-batch-tokens does not apply"),
    ],
)
def test_what_cannot_be_read_is_refused_and_nothing_written(artifacts, tmp_path, name, content, options, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LlmoptError, match=r".") as caught:
        run(artifacts("bert", "sentence"), tmp_path / name, tmp_path / "out.jsonl", **options)
    assert says in str(caught.value)
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (no_tokenizer, "has no tokenizer"),
        (lambda folder: (folder / "config.json").unlink(), "does not say what it does"),
        (lambda folder: (folder / "model.onnx").unlink(), "nothing that a runtime opens"),
        (lambda folder: (folder / "modules.json").unlink(), "gives no results"),
    ],
)
def test_an_artifact_that_does_not_do_it(artifacts, texts, tmp_path, damage, says):
    artifact = tmp_path / "copy"
    shutil.copytree(artifacts("bert", "sentence"), artifact)
    damage(artifact)
    with pytest.raises(UsageError, match=says) as caught:
        run(artifact, texts, tmp_path / "out.jsonl")
    assert caught.value.hint
    assert not list(tmp_path.glob("out*"))


def test_a_graph_without_pooling(artifacts, texts, tmp_path):
    artifact = tmp_path / "copy"
    shutil.copytree(artifacts("bert", "BertModel"), artifact)
    shutil.copyfile(artifacts("bert", "sentence") / "modules.json", artifact / "modules.json")
    with pytest.raises(LlmoptError, match="gives no `sentence_embedding`"):
        run(artifact, texts, tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out*"))


def test_batches_are_not_for_generators(artifacts, texts, tmp_path):
    with pytest.raises(UsageError, match="one text at a time"):
        run(artifacts("llama", "LlamaForCausalLM"), texts, tmp_path / "out.jsonl", batching="dp")


@pytest.mark.parametrize("place", ["texts.jsonl", "missing/out.jsonl", "."])
def test_places_that_cannot_be_written(artifacts, texts, tmp_path, place):
    with pytest.raises(UsageError, match=r".") as caught:
        run(artifacts("bert", "sentence"), texts, tmp_path / place, force=True)
    assert caught.value.hint


@pytest.mark.parametrize("by_fill", [0, 1])
def test_costs_tell_whether_padding_is_computed(by_fill, monkeypatch):
    """With a clock that follows the batches."""
    now = [0.0]
    monkeypatch.setattr("llmopt.pipeline.costs.time.perf_counter", lambda: now[0])

    def timer(lengths):
        took = 1e-4 * (sum(lengths) if by_fill else max(lengths) * len(lengths))
        now[0] += took
        return took

    table = measure_costs(timer, longest=128, size=32, seconds=0.5)
    assert table.by_fill == pytest.approx(by_fill)
    assert now[0] < 1.0
    assert table(128, 32, 128 * 32) == pytest.approx(128 * 32e-4)
    assert table(20, 3, 60) == pytest.approx(60e-4)


def test_costs_of_single_short_texts():
    table = measure_costs(lambda lengths: 1e-4 * len(lengths), longest=3, size=1, seconds=0.1)
    assert table(3, 1, 3) == pytest.approx(1e-4)


def test_bench_of_an_encoder_counts_padding(artifacts, texts):
    from llmopt.pipeline.bench import bench

    artifact = artifacts("bert", "sentence")
    options = {"against": None, "repeats": 2, "prompt_tokens": 8, "new_tokens": 1, "threads": 1, "reporter": Silent()}
    made_up = bench(str(artifact), **options)["measured"][0]
    assert (made_up["texts"], made_up["tokens"], made_up["fill_ratio"]) == (8, 64, 1)
    measured = bench(str(artifact), **options, data=str(texts))["measured"][0]
    lengths = [len(row) for row in load_tokenizer(artifact)(TEXTS)["input_ids"]]
    lengths = [min(length, 64) for length in lengths]
    parts = [lengths[start : start + 8] for start in (0, 8, 16)]
    assert (measured["texts"], measured["tokens"]) == (23, sum(lengths))
    assert measured["padded_tokens"] == sum(len(part) * max(part) for part in parts)
    assert measured["fill_ratio"] == measured["tokens"] / measured["padded_tokens"]
    assert 0 < measured["p50_batch_seconds"] <= measured["p95_batch_seconds"]
    assert measured["tokens_per_second"] / measured["sequences_per_second"] == pytest.approx(sum(lengths) / 23, rel=0.5)


def test_bench_of_a_generator_takes_no_texts(artifacts, texts):
    from llmopt.pipeline.bench import bench

    options = {"against": None, "repeats": 1, "prompt_tokens": 8, "new_tokens": 1, "threads": 1, "reporter": Silent()}
    with pytest.raises(UsageError, match="--input is for encoders"):
        bench(str(artifacts("llama", "LlamaForCausalLM")), **options, data=str(texts))


class TestAdapter:
    """An adapter beside the weights belongs to the artifact: what is computed and measured is both together."""

    @pytest.fixture
    def adapted(self, tmp_path):
        save_head("bert", "BertForSequenceClassification", tmp_path / "model")
        steps = ("rtn", {"bits": 2, "group_size": 32}), ("extract-adapter", {"rank": 8, "weighting": "none"})
        build(recipe(tmp_path / "model", *steps, export=("safetensors", {"format": "plain"})), tmp_path / "adapted")
        return tmp_path / "adapted"

    def test_infer(self, adapted, texts, tmp_path):
        _, rows = run(adapted, texts, tmp_path / "both.jsonl")
        base = shutil.copytree(adapted, tmp_path / "base", ignore=shutil.ignore_patterns("adapter"))
        (base / "llmopt.json").unlink()
        _, alone = run(base, texts, tmp_path / "base.jsonl")
        import torch
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification

        model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), adapted / "adapter")
        tokenizer = load_tokenizer(adapted)
        for row, other, text in zip(rows, alone, TEXTS, strict=True):
            with torch.no_grad():
                scores = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(0)
            got, without = (list(one["scores"].values()) for one in (row, other))
            assert np.abs(np.array(got) - scores.numpy()).max() < 1e-5
            assert np.abs(np.array(without) - scores.numpy()).max() > 1e-4

    def test_bench(self, adapted):
        from llmopt.pipeline.bench import bench

        options = {"repeats": 1, "prompt_tokens": 8, "new_tokens": 1, "threads": 1, "reporter": Silent()}
        assert bench(str(adapted), against=None, **options)["measured"][0]["tokens_per_second"] > 0
        (adapted / "adapter" / "adapter_model.safetensors").write_bytes(b"")
        with pytest.raises(LlmoptError, match="peft does not load"):
            bench(str(adapted), against=None, **options)
