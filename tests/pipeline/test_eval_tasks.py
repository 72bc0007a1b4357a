"""`llmopt eval`: each task against a naive computation, on an artifact and its source."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from families import save_head, save_sentence_folder
from helpers import build, recipe
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.core.progress import Silent
from llmopt.models.text import load_tokenizer
from llmopt.pipeline.measuring.asking import EvalOptions
from llmopt.pipeline.measuring.evaluate import evaluate
from llmopt.pipeline.measuring.tasks import TaskOptions
from scipy import stats
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "5", "mice"]


def text(seed, words=6):
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(path, data, tmp_path, **options):
    """Return the report, the metrics' values by name, and what was found of each sample."""
    samples = tmp_path / "samples.jsonl"
    made = EvalOptions(data, write=samples, **options)
    report = evaluate(str(path), data=data, options=made, reporter=Silent())
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return report, {row["metric"]: row for row in report["metrics"]}, rows


@pytest.fixture(scope="module")
def decoder(family, tmp_path_factory):
    """Return a tiny Llama and its 8-bit artifact."""
    out = tmp_path_factory.mktemp("decoder") / "out"
    source = family("llama")
    build(recipe(source, ("rtn", {"bits": 8, "group_size": 32})), out)
    return source, out


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Return a tiny sentence-transformers folder and its ONNX artifact."""
    root = tmp_path_factory.mktemp("encoder")
    save_sentence_folder(root / "model")
    build(recipe(root / "model", export=("onnx", {})), root / "out")
    return root / "model", root / "out"


def test_multiple_choice_takes_the_likeliest(decoder, tmp_path):
    source, out = decoder
    rows = [
        {"question": text(n), "choices": [text(n + k, 1 + k % 4) for k in (50, 91, 2)], "answer": n % 3}
        for n in range(9)
    ]
    report, metrics, found = run(source, write(tmp_path / "q.jsonl", rows), tmp_path)
    assert (report["task"], report["samples"]) == ("multiple-choice", 9)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source).eval(), load_tokenizer(source)
    for row, made in zip(rows, found, strict=True):
        scores = []
        for choice in row["choices"]:
            start = len(tokenizer(row["question"])["input_ids"])
            ids = torch.tensor([tokenizer(f"{row['question']} {choice}")["input_ids"]])
            with torch.inference_mode():
                logs = model(ids).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logs[at - 1, ids[0, at]]) for at in range(start, ids.shape[1])))
        assert made["likelihoods"] == pytest.approx(scores, abs=1e-4)
        assert made["predicted"] == int(np.argmax(scores))
        normalized = [score / len(choice.encode()) for score, choice in zip(scores, row["choices"], strict=True)]
        assert made["correct_normalized"] == float(int(np.argmax(normalized)) == row["answer"])
    assert metrics["accuracy"]["value"] == np.mean([made["correct"] for made in found])
    assert metrics["accuracy"]["low"] <= metrics["accuracy"]["value"] <= metrics["accuracy"]["high"]
    _, metrics, found = run(out, write(tmp_path / "q.jsonl", rows), tmp_path)
    assert metrics["accuracy_drop"]["value"] == metrics["accuracy"]["source"] - metrics["accuracy"]["value"]
    assert all("source_likelihoods" in made for made in found)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [([0, 1], [0, 1]), ([1, 2], [0, 1]), (["A", "b"], [0, 1]), (["one", "two"], [0, 1]), (["2", "1"], [1, 0])],
)
def test_answers_are_understood_as_they_are_written(decoder, tmp_path, answers, expected):
    rows = [{"question": "the", "choices": ["one", "two"], "answer": answer} for answer in answers]
    _, _, found = run(decoder[0], write(tmp_path / "q.jsonl", rows), tmp_path)
    assert [made["answer"] for made in found] == expected


def test_choices_come_in_other_forms_too(decoder, tmp_path):
    arc = {"question": "the", "choices": {"text": ["x", "y"], "label": ["C", "D"]}, "answerKey": "D"}
    mmlu = {"question": "the", "A": "x", "B": "y", "answer": "B"}
    for row in (arc, mmlu):
        _, _, found = run(decoder[0], write(tmp_path / "q.jsonl", [row]), tmp_path)
        assert (found[0]["choices"], found[0]["answer"]) == (["x", "y"], 1)


def test_generation_is_matched_exactly(decoder, tmp_path):
    source, _ = decoder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source).eval(), load_tokenizer(source)
    rows = []
    for n in range(6):
        ids = tokenizer(text(n), return_tensors="pt")
        made = model.generate(ids["input_ids"], do_sample=False, max_new_tokens=5, min_new_tokens=5)
        answer = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        rows.append({"prompt": text(n), "answer": ["no", f"  {answer} "] if n % 2 else "something else"})
    data = write(tmp_path / "g.jsonl", rows)
    report, metrics, found = run(source, data, tmp_path, samples=TaskOptions(max_new_tokens=5))
    assert report["task"] == "generate"
    assert [made["exact"] for made in found] == [0.0, 1.0] * 3
    assert metrics["exact_match"]["value"] == 0.5


def test_perplexity_has_intervals_and_the_source_beside(decoder, tmp_path):
    source, out = decoder
    path = tmp_path / "text.txt"
    path.write_text("\n".join(text(n, 40) for n in range(30)))
    plain = evaluate(str(source), data=str(path), length=32, reporter=Silent())
    report, metrics, found = run(out, str(path), tmp_path, samples=TaskOptions(length=32))
    assert report["source"]["perplexity"] == plain["perplexity"] == pytest.approx(metrics["perplexity"]["source"])
    assert metrics["perplexity"]["value"] == pytest.approx(report["perplexity"])
    assert metrics["perplexity_increase"]["value"] == pytest.approx(report["source"]["perplexity_increase_share"])
    assert metrics["mean_kl"]["value"] == pytest.approx(report["source"]["mean_kl_nats"])
    assert metrics["mean_kl"]["low"] < metrics["mean_kl"]["value"] < metrics["mean_kl"]["high"]
    assert len(found) == report["windows"] == report["samples"]


def test_a_window_is_as_long_as_the_context_allows(family, tmp_path):
    source = family("llama", max_position_embeddings=48)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(text(n, 40) for n in range(10)))
    report = evaluate(str(source), data=str(path), reporter=Silent())
    assert report["tokens"] == report["windows"] * 47
    with pytest.raises(UsageError, match="longer than the context"):
        evaluate(str(source), data=str(path), length=48, reporter=Silent())


def test_classes(tmp_path):
    names = {0: "no", 1: "maybe", 2: "yes"}
    save_head("bert", "BertForSequenceClassification", tmp_path / "model", id2label=names)
    rows = [{"text": text(n), "label": [n % 3, names[n % 3], str(n % 3)][n % 2]} for n in range(12)]
    report, metrics, found = run(tmp_path / "model", write(tmp_path / "c.jsonl", rows), tmp_path)
    assert report["task"] == "classify"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = load_tokenizer(tmp_path / "model")
    for n, made in enumerate(found):
        with torch.inference_mode():
            logits = model(torch.tensor([tokenizer(text(n))["input_ids"]])).logits
        assert (made["expected"], made["predicted"]) == (n % 3, int(logits.argmax()))
    assert metrics["accuracy"]["value"] == np.mean([made["expected"] == made["predicted"] for made in found])
    with pytest.raises(UsageError, match="none that is known"):
        run(tmp_path / "model", write(tmp_path / "c.jsonl", [{"text": "a", "label": "perhaps"}]), tmp_path)


def test_similarity_of_an_artifact_and_its_source(encoder, tmp_path):
    source, out = encoder
    rows = [{"sentence1": text(n), "sentence2": text(n // 2 + 7, 3), "score": (7 * n) % 5} for n in range(20)]
    data = write(tmp_path / "s.jsonl", rows)
    report, metrics, found = run(out, data, tmp_path)
    assert (report["task"], report["runtime"].split()[0]) == ("similarity", "onnxruntime")
    expected = stats.spearmanr([row["score"] for row in rows], [made["similarity"] for made in found]).statistic
    assert metrics["spearman"]["value"] == pytest.approx(expected)
    # The source pools in transformers as its files say, and gives what the graph gives.
    for made in found:
        assert made["similarity"] == pytest.approx(made["source_similarity"], abs=1e-5)
    assert run(source, data, tmp_path)[1]["spearman"]["value"] == pytest.approx(metrics["spearman"]["source"])


def test_retrieval_ranks_all_documents(encoder, tmp_path):
    _, out = encoder
    rows = [{"query": text(n % 6), "document": text(n % 9, 4), "relevance": n % 3} for n in range(18)]
    rows += [{"query": text(100), "document": text(100), "relevance": 1}]
    report, metrics, found = run(out, write(tmp_path / "r.jsonl", rows), tmp_path)
    assert report["task"] == "retrieval"
    assert found[-1]["best"] == text(100)
    assert found[-1]["ndcg"] == 1.0
    assert 0 < metrics["ndcg_at_10"]["value"] <= 1


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"question": "a"}], {"task": "multiple-choice"}, "cannot tell which column of"),
        ([{"question": "a"}], {"task": "multiple"}, "unknown task `multiple`"),
        ([{"question": "a"}], {"task": "similarity"}, "cannot be measured at similarity"),
        ([{"question": "a", "choices": ["x", "y"], "answer": 3}], {}, "the answer in line 1"),
        ([{"question": "a", "choices": "x", "answer": 0}], {}, "are no list of texts"),
        ([{"question": 1, "choices": ["x", "y"], "answer": 0}], {}, "the question in line 1"),
        ([{"a": "b", "c": "d"}], {"columns": {"answer": "a"}, "task": "perplexity"}, "perplexity has no column"),
        ([{"a": "b", "c": "d"}], {"columns": {"": "a"}, "task": "generate"}, "does not say what the column is for"),
    ],
)
def test_what_cannot_be_measured_is_refused(decoder, tmp_path, rows, options, message):
    with pytest.raises(LlmoptError) as refused:
        run(decoder[0], write(tmp_path / "x.jsonl", rows), tmp_path, **options)
    assert message in refused.value.what
    assert refused.value.hint
    assert not (tmp_path / "samples.jsonl").exists()


def test_samples_never_overwrite_what_is_read(decoder, tmp_path):
    rows = [{"question": "the", "choices": ["one", "two"], "answer": 0}]
    data = write(tmp_path / "samples.jsonl", rows)
    with pytest.raises(UsageError, match="is what is read"):
        run(decoder[0], data, tmp_path)
    assert json.loads((tmp_path / "samples.jsonl").read_text()) == rows[0]


def test_an_encoder_decoder_generates(family, tmp_path):
    from transformers import AutoModelForSeq2SeqLM

    source = family("t5")
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(source).eval(), load_tokenizer(source)
    ids = tokenizer(text(1), return_tensors="pt")["input_ids"]
    made = model.generate(ids, do_sample=False, max_new_tokens=4, min_new_tokens=4)
    answer = tokenizer.decode(made[0, 1:], skip_special_tokens=True)
    data = write(tmp_path / "g.jsonl", [{"input": text(1), "target": answer}])
    report, metrics, _ = run(source, data, tmp_path, samples=TaskOptions(max_new_tokens=4))
    assert report["task"] == "generate"
    assert metrics["exact_match"]["value"] == 1


@pytest.mark.parametrize(
    ("task", "samples"),
    [("lm-eval:tiny", {"length": 9}), ("multiple-choice", {"length": 9}), ("perplexity", {"max_new_tokens": 9})],
)
def test_settings_that_a_task_does_not_heed_are_refused(decoder, tmp_path, task, samples):
    data = write(tmp_path / "q.jsonl", [{"question": "a", "choices": ["b", "c"], "answer": 0, "text": "a b c"}])
    options = EvalOptions(str(data), task=task, samples=TaskOptions(**samples))
    with pytest.raises(UsageError, match=r"does not heed|does not apply"):
        evaluate(str(decoder[0]), data=str(data), options=options, reporter=Silent())


def test_a_task_of_the_harness_without_the_harness_is_refused(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr("llmopt.pipeline.measuring.harness.find_spec", lambda name: None)
    with pytest.raises(UsageError) as refused:
        run(decoder[0], None, tmp_path, task="lm-eval:hellaswag")
    assert refused.value.hint == "pip install lm_eval"


def test_a_task_of_the_harness_agrees_with_ours(decoder, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"question": text(n), "choices": [text(n + k, 2) for k in (50, 91)], "answer": n % 2} for n in range(12)]
    data = write(tmp_path / "q.jsonl", rows)
    (tmp_path / "ours.yaml").write_text(
        "task: ours\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        'output_type: multiple_choice\ntest_split: test\ndoc_to_text: "{{question}}"\n'
        'doc_to_target: "{{answer}}"\ndoc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]\n'
    )
    _, metrics, _ = run(decoder[0], data, tmp_path)
    report, theirs, found = run(decoder[0], str(tmp_path), tmp_path, task="lm-eval:ours")
    assert report["samples"] == len(found) == 12
    assert theirs["ours acc"]["value"] == metrics["accuracy"]["value"]
    assert theirs["ours acc"]["low"] == metrics["accuracy"]["low"]
    with pytest.raises(UsageError, match="no task `our`"):
        run(decoder[0], str(tmp_path), tmp_path, task="lm-eval:our")
