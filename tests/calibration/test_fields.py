"""Columns and their roles: the usual names are found, others are named, and nothing is guessed."""

import json
import re

import pytest
from llmopt.calibration.fields import Role, open_fields
from llmopt.core.errors import LlmoptError, UsageError

ROLES = (
    Role("question", ("question", "prompt")),
    Role("choices", ("choices", "options"), several=re.compile("[A-D]|option_?[0-9]")),
    Role("answer", ("answer", "label")),
    Role("hint", ("hint",), required=False),
)
PAIR = (Role("first", ("first", "sentence1")), Role("second", ("second", "sentence2")), Role("score", ("score",)))


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def values(spec, roles=ROLES, **named):
    fields = open_fields(spec, roles, named)
    return fields, [row.values for row in fields.rows()]


def test_usual_names_are_found_whatever_their_case(jsonl):
    _, rows = values(jsonl({"Question": "q", "OPTIONS": ["a", "b"], "answer": 1, "id": 7}))
    assert rows == [{"question": "q", "choices": ["a", "b"], "answer": 1}]


def test_several_columns_play_one_role(jsonl):
    _, rows = values(jsonl({"prompt": "q", "B": "y", "A": "x", "label": "A"}))
    assert rows[0]["choices"] == ["x", "y"]
    _, rows = values(jsonl({"prompt": "q", "right": "y", "wrong": "x", "label": "A"}), choices="right+wrong")
    assert rows[0]["choices"] == ["y", "x"]


def test_columns_are_named(jsonl):
    _, rows = values(jsonl({"q": "?", "choices": ["a", "b"], "gold": 0, "hint": "h"}), question="q", answer="gold")
    assert rows == [{"question": "?", "choices": ["a", "b"], "answer": 0, "hint": "h"}]


@pytest.mark.parametrize(
    ("named", "message", "hint"),
    [
        ({}, "cannot tell which column of", "--column answer=NAME"),
        ({"anser": "gold"}, "no column is called for as `anser`", "did you mean `answer`?"),
        ({"answer": "golt"}, "no column `golt` in", "did you mean `gold`?"),
    ],
)
def test_what_cannot_be_told_is_refused(jsonl, named, message, hint):
    spec = jsonl({"question": "q", "choices": ["a", "b"], "gold": 0})
    with pytest.raises(UsageError) as refused:
        values(spec, **named)
    assert message in refused.value.what
    assert hint in refused.value.hint


def test_a_row_without_a_column_is_told_by_its_line(jsonl):
    spec = jsonl({"question": "q", "choices": ["a", "b"], "answer": 0}, {"question": "q", "choices": ["a"]})
    with pytest.raises(LlmoptError, match="no `answer` in line 2"):
        values(spec)


def test_a_csv_file_without_a_header_is_taken_by_order(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('"one, two",three,4.5\nfour,five,0\n')
    fields, rows = values(str(path), PAIR)
    assert fields.unnamed
    assert rows == [
        {"first": "one, two", "second": "three", "score": "4.5"},
        {"first": "four", "second": "five", "score": "0"},
    ]
    _, rows = values(str(path), PAIR, first="1", second="0", score="2")
    assert rows[1]["first"] == "five"


def test_a_csv_file_with_a_header_is_read_by_its_names(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("score,sentence2,sentence1\n1,b,a\n")
    fields, rows = values(str(path), PAIR)
    assert not fields.unnamed
    assert rows == [{"first": "a", "second": "b", "score": "1"}]


def test_parquet_gives_all_columns(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "questions.parquet"
    parquet.write_table(pa.table({"question": ["q"], "choices": [["a", "b"]], "answer": [1]}), path)
    assert values(str(path))[1] == [{"question": "q", "choices": ["a", "b"], "answer": 1}]


def test_data_without_rows_is_refused(tmp_path):
    path = tmp_path / "none.jsonl"
    path.write_text("\n")
    with pytest.raises(LlmoptError, match="holds no rows"):
        values(str(path))
