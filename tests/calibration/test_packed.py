"""Text to learn from: rows on disk, some of them held out."""

import pytest
from families import LINES, make_tokenizer
from llmopt.calibration.packed import load_rows
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.core.progress import Silent
from llmopt.core.text import TextRequest


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def loaded(path, tokenizer, tmp_path, seed=0, **changes):
    settings = {"column": None, "length": 16, "packing": True, "rows": 1000, "held_out": 4} | changes
    return load_rows(TextRequest(str(path), **settings), tokenizer, tmp_path / "text.bin", seed=seed, reporter=Silent())


def test_packed_rows_are_the_text(text, tokenizer, tmp_path):
    made = loaded(text, tokenizer, tmp_path)
    ids = tokenizer(text.read_text())["input_ids"]
    whole = [ids[start : start + 16] for start in range(0, len(ids) // 16 * 16, 16)]
    rows, held_out = list(made.rows), list(made.held_out)
    assert len(held_out) == 4
    assert rows == [row for row in whole if row not in held_out]  # in the order of the text, and none of it twice
    assert all(row in whole for row in held_out)
    assert list(made.rows[1:3]) == rows[1:3]


def test_one_text_a_row(tmp_path, tokenizer):
    path = tmp_path / "lines.txt"
    path.write_text("\n\n".join(LINES * 20))
    made = loaded(path, tokenizer, tmp_path, packing=False, held_out=2)
    assert len(made.held_out) == 2
    expected = {tuple(tokenizer(line)["input_ids"][:16]) for line in LINES}
    assert {tuple(row) for row in [*made.rows, *made.held_out]} == expected
    assert not {tuple(row) for row in made.rows} & {tuple(row) for row in made.held_out}


def test_reading_stops_where_no_more_is_of_use(text, tokenizer, tmp_path):
    made = loaded(text, tokenizer, tmp_path, rows=50, held_out=3)
    assert (len(made.rows), len(made.held_out)) == (50, 3)
    assert (tmp_path / "text.bin").stat().st_size == 53 * 16 * 4


def test_at_most_a_tenth_is_held_out(text, tokenizer, tmp_path):
    made = loaded(text, tokenizer, tmp_path, rows=20, held_out=10)
    assert (len(made.rows), len(made.held_out)) == (27, 3)


def test_the_seed_chooses_what_is_held_out(text, tokenizer, tmp_path):
    first, other = loaded(text, tokenizer, tmp_path), loaded(text, tokenizer, tmp_path, seed=1)
    assert first.sha256 == other.sha256
    assert list(first.held_out) != list(other.held_out)


def test_too_little_and_missing_text(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("short")
    with pytest.raises(LlmoptError, match="holds too little text"):
        loaded(path, tokenizer, tmp_path, length=512)
    with pytest.raises(UsageError, match="no file"):
        loaded(tmp_path / "missing.txt", tokenizer, tmp_path)
