"""Vocabularies as tokenizer.json has them, and which tokens two of them share."""

import json

import pytest
from families import make_tokenizer
from llmopt.models.vocabulary import ids_in, vocabulary


def test_it_is_what_the_library_says(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert vocabulary(tmp_path) == tokenizer.get_vocab()


def test_a_list_of_pieces_with_scores(tmp_path):
    document = {"model": {"vocab": [["<unk>", 0.0], ["a", -1.5]]}, "added_tokens": [{"content": "<x>", "id": 2}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert vocabulary(tmp_path) == {"<unk>": 0, "a": 1, "<x>": 2}


@pytest.mark.parametrize(
    ("student", "teacher", "ids"),
    [
        ({"a": 0, "b": 1}, {"b": 1, "a": 0}, None),
        ({"a": 0, "b": 1}, {"a": 5, "c": 1}, [5, -1]),
        ({"a": 2}, {"a": 0}, [-1, -1, 0]),
    ],
)
def test_shared_tokens(student, teacher, ids):
    assert ids_in(student, teacher) == ids
