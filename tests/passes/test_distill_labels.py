"""Labels as a loss: classes of texts, and the answers that continue them."""

import json

import pytest
import torch
import transformers
from families import save_head
from helpers import build, recipe
from llmopt.calibration.labelled import labelled_rows
from llmopt.calibration.packed import load_rows
from llmopt.calibration.source import open_source
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.core.passes import PassResult
from llmopt.core.progress import Silent
from llmopt.core.text import Labels, TextRequest
from llmopt.models.text import load_tokenizer
from llmopt.passes.training.distillation import _known_rows
from llmopt.passes.training.losses import answer_tokens
from llmopt.pipeline.plan import make_plan

LEARN = {"steps": 30, "batch_size": 4, "length": 24, "learning_rate": 3e-3, "held_out": 8, "labels": 1.0}
COLUMNS = {"column": "question", "label_column": "answer"}


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def questions(tmp_path):
    """Questions whose answers follow from their first word, under two columns of a .jsonl file."""
    kinds = [("fox", " jumps over"), ("dog", " lazy")]
    rows = [{"question": f"{kinds[n % 2][0]} {n}?", "answer": kinds[n % 2][1]} for n in range(120)]
    return written(tmp_path / "questions.jsonl", rows)


@pytest.fixture
def classes(tmp_path):
    rows = [{"text": f"{('fox', 'dog')[n % 2]} number {n}", "class": ("LABEL_0", 1)[n % 2]} for n in range(120)]
    return written(tmp_path / "classes.jsonl", rows)


def request(data, labels, column=None, length=24):
    return TextRequest(str(data), column, length, False, 100, 8, labels)


def found(data, asked, tokenizer):
    return list(labelled_rows(open_source(str(data), asked.column), asked, tokenizer))


class TestRows:
    def test_a_question_and_its_answer(self, family, questions):
        tokenizer = load_tokenizer(family("llama"))
        rows = found(questions, request(questions, Labels("answer", None), "question"), tokenizer)
        assert len(rows) == 120
        ids, start = rows[0]
        assert ids[:start] == tokenizer("fox 0?")["input_ids"]
        assert ids[start:] == [*tokenizer(" jumps over", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def test_what_leaves_no_room_is_left_out_and_an_answer_is_cut(self, family, tmp_path):
        tokenizer = load_tokenizer(family("llama"))
        data = written(
            tmp_path / "a.jsonl", [{"text": "fox " * 40, "answer": "no"}, {"text": "dog", "answer": "yes " * 40}]
        )
        ((ids, start),) = found(data, request(data, Labels("answer", None), length=12), tokenizer)
        assert len(ids) == 12
        assert start == len(tokenizer("dog")["input_ids"])

    def test_classes_by_name_and_by_number(self, family, classes):
        asked = request(classes, Labels("class", ("LABEL_0", "Label_1")))
        assert [label for _, label in found(classes, asked, load_tokenizer(family("bert")))] == [0, 1] * 60

    def test_what_is_no_class_and_no_column(self, family, classes):
        tokenizer = load_tokenizer(family("bert"))
        with pytest.raises(LlmoptError, match="`LABEL_0` is no class of the model") as caught:
            found(classes, request(classes, Labels("class", ("cat", "fox"))), tokenizer)
        assert "line 1" in caught.value.where
        with pytest.raises(UsageError, match="no column `kind`") as caught:
            found(classes, request(classes, Labels("kind", ("cat", "fox"))), tokenizer)
        assert "it has text, class" in caught.value.where

    def test_labels_stay_with_their_rows(self, family, classes, tmp_path):
        asked = request(classes, Labels("class", ("LABEL_0", "LABEL_1")))
        tokenizer = load_tokenizer(family("bert"))
        rows = load_rows(asked, tokenizer, tmp_path / "rows.bin", seed=3, reporter=Silent())
        assert (len(rows.labels), len(rows.held_out_labels)) == (len(rows.rows), 8)
        for ids, label in [
            *zip(rows.rows, rows.labels, strict=True),
            *zip(rows.held_out, rows.held_out_labels, strict=True),
        ]:
            assert ("dog" in tokenizer.decode(ids)) == bool(label)
        swapped = written(tmp_path / "swapped.jsonl", [{"text": "fox number 0", "class": 1}])
        plain = written(tmp_path / "plain.jsonl", [{"text": "fox number 0", "class": 0}])
        digests = {
            load_rows(request(one, asked.labels), tokenizer, tmp_path / "rows.bin", seed=0, reporter=Silent()).sha256
            for one in (swapped, plain)
        }
        assert len(digests) == 2

    def test_rows_that_a_teacher_does_not_know_go_with_their_labels(self):
        ids = torch.tensor([0, 1, -1, 3])
        assert _known_rows([[0, 1], [2, 1], [3]], [7, 8, 9], ids, PassResult(), "rows") == ([[0, 1], [3]], [7, 9])


def test_only_the_answer_counts():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))
    mask = torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    logs = logits.log_softmax(-1)
    expected = -sum(logs[0, at - 1, ids[0, at]] for at in (3, 4)) - sum(logs[1, at - 1, ids[1, at]] for at in (1, 2, 3))
    got = answer_tokens(logits, ids, mask, torch.tensor([3, 1]))
    assert float(got) == pytest.approx(float(expected), rel=1e-5)


def held_out(data, labels, base, tmp_path, column=None):
    made = load_rows(
        TextRequest(str(data), column, 24, False, LEARN["steps"] * LEARN["batch_size"], LEARN["held_out"], labels),
        load_tokenizer(base),
        tmp_path / "again.bin",
        seed=0,
        reporter=Silent(),
    )
    return list(zip(made.held_out, made.held_out_labels, strict=True))


@pytest.mark.parametrize("others", [{}, {"kl": 0.5}], ids=["alone", "kl"])
def test_a_decoder_learns_the_answers(family, questions, tmp_path, others):
    """Without a teacher where they are the only loss; what was measured is what the exported model gives."""
    base = family("llama")
    learn = ("distill", {**LEARN, **COLUMNS, **others, "data": str(questions)})
    made = build(recipe(base, learn), tmp_path / "out")
    record = made.passes[0].metrics
    assert record["held_out_labels_after_nats"] < 0.5 * record["held_out_labels_before_nats"]
    assert ("held_out_kl_after_nats" in record) == bool(others)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    total = count = 0.0
    for row, start in held_out(questions, Labels("answer", None), base, tmp_path, "question"):
        with torch.no_grad():
            logs = model(torch.tensor([row])).logits[0].log_softmax(-1)
        total -= sum(float(logs[at - 1, row[at]]) for at in range(start, len(row)))
        count += len(row) - start
    assert total / count == pytest.approx(record["held_out_labels_after_nats"], rel=1e-3)


def test_a_classifier_learns_the_classes(classes, tmp_path):
    base = tmp_path / "model"
    save_head("bert", "BertForSequenceClassification", base)
    learn = ("distill", {**LEARN, "label_column": "class", "data": str(classes)})
    made = build(recipe(base, learn), tmp_path / "out")
    record = made.passes[0].metrics
    assert record["held_out_labels_after_nats"] < 0.5 * record["held_out_labels_before_nats"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    losses = []
    for row, label in held_out(classes, Labels("class", ("LABEL_0", "LABEL_1")), base, tmp_path):
        with torch.no_grad():
            losses.append(-float(model(torch.tensor([row])).logits[0].log_softmax(-1)[label]))
    assert sum(losses) / len(losses) == pytest.approx(record["held_out_labels_after_nats"], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label_column": None}, "labels are read from a column of `data`"),
        ({"data": "text.txt", "column": None}, "labels are read from a column of `data`"),
        ({"packing": True}, "packed rows have no labels"),
        ({"labels": None, "lm": 1.0}, "`label_column` does nothing without"),
        ({"align_vocab": True}, "`align_vocab` does nothing without"),
    ],
)
def test_refusals(family, questions, changes, words):
    learn = {**LEARN, **COLUMNS, "data": str(questions), **changes}
    with pytest.raises(UsageError, match=words) as caught:
        make_plan(recipe(family("llama"), ("distill", learn)))
    assert caught.value.hint


def test_a_model_without_classes_is_refused(family, questions):
    learn = {**LEARN, **COLUMNS, "data": str(questions)}
    with pytest.raises(UsageError, match="the loss `labels` does not suit the model"):
        make_plan(recipe(family("roberta"), ("distill", learn)))
