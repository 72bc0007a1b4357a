"""Windows for evaluation: their bounds, and that taking fewer changes none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt.calibration import windows as module
from llmopt.calibration.windows import load_windows
from llmopt.core.errors import LlmoptError, UsageError


def load(path, tokenizer, *, column=None, length=32, limit=None):
    return load_windows(str(path), column, tokenizer, length=length, limit=limit)


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def test_length_counts_the_predicted_tokens_after_a_bos(book, tokenizer):
    windows = load(book, tokenizer)
    ids = plain(tokenizer, book.read_text(encoding="utf-8"))
    assert all(len(row) == 33 and row[0] == tokenizer.bos_token_id for row in windows.rows)
    assert [token for row in windows.rows for token in row[1:]] == ids[: len(ids) // 32 * 32]
    assert windows.tokens == 32 * len(windows.rows)
    assert windows.source == str(book)


def test_without_a_bos_the_first_token_is_not_predicted(book, bare):
    windows = load(book, bare)
    assert all(len(row) == 32 for row in windows.rows)
    assert windows.tokens == 31 * len(windows.rows)


def test_a_partial_window_stays_if_it_is_the_only_one(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("The quick brown fox", encoding="utf-8")
    ids = plain(tokenizer, "The quick brown fox")
    windows = load(path, tokenizer)
    assert windows.rows == [[tokenizer.bos_token_id, *ids]]
    assert windows.tokens == len(ids)


@pytest.mark.parametrize("limit", [1, 2, 7, 10_000])
def test_limit_takes_the_first_windows(book, tokenizer, limit, monkeypatch):
    monkeypatch.setattr(module, "CHARS_PER_TOKEN", 1)  # so that it has to read on
    assert load(book, tokenizer, limit=limit).rows == load(book, tokenizer).rows[:limit]


def test_limit_does_not_read_on(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("".join('{"text": "The quick brown fox"}\n' for _ in range(500)) + "no JSON\n", encoding="utf-8")
    assert len(load(path, tokenizer, limit=3).rows) == 3
    with pytest.raises(LlmoptError, match="line 501"):
        load(path, tokenizer)


def test_texts_are_joined_by_blank_lines(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"n": 1, "body": text}) + "\n" for text in ("one", "", "two")), encoding="utf-8")
    (row,) = load(path, tokenizer, column="body").rows
    assert tokenizer.decode(row[1:]) == "one\n\n\n\ntwo"
    with pytest.raises(UsageError):
        load(path, tokenizer, column="bdy")


@pytest.mark.parametrize("bos", [True, False])
def test_too_little_text(tmp_path, make_tokenizer, bos):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "" if bos else "x"}) + "\n", encoding="utf-8")
    with pytest.raises(LlmoptError, match="holds too little text") as caught:
        load(path, make_tokenizer(bos=bos))
    assert caught.value.where == f"{0 if bos else 1} tokens"


@settings(max_examples=60, deadline=None)
@given(text=st.text("abc xyz.\té漢\n", min_size=2, max_size=400), length=st.integers(2, 20), limit=st.integers(1, 5))
def test_windows_cover_the_text(tokenizer, tmp_path_factory, text, length, limit):
    path = tmp_path_factory.mktemp("data") / "a.txt"
    path.write_text(text, encoding="utf-8", newline="")
    ids = plain(tokenizer, text)
    rows = load(path, tokenizer, length=length, limit=limit).rows
    assert all(row[0] == tokenizer.bos_token_id for row in rows)
    body = [token for row in rows for token in row[1:]]
    assert body == (ids[: min(limit, len(ids) // length) * length] or ids)
