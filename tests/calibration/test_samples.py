"""Drawing rows: by seed, from full windows, never twice, and with memory that does not follow the data."""

from __future__ import annotations

import hashlib
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt.calibration import samples as module
from llmopt.calibration.records import Document
from llmopt.calibration.samples import load_samples
from llmopt.calibration.source import open_source
from llmopt.calibration.tokens import encode
from llmopt.core.errors import ExitCode, LlmoptError
from llmopt.core.progress import Silent
from llmopt.core.recipe import CalibrationSpec


def load(path, tokenizer, *, seed=0, held_out=0, reporter=None, **options):
    spec = CalibrationSpec(data=str(path), **options)
    return load_samples(spec, tokenizer, seed=seed, held_out=held_out, reporter=reporter or Silent())


def windows_of(stream, length):
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]


def test_packed_rows_are_full_windows_of_the_text(book, tokenizer, reporter):
    samples = load(book, tokenizer, samples=16, length=32, reporter=reporter)
    stream = tokenizer(book.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    windows = windows_of(stream, 32)
    assert len(samples.rows) == 16
    assert all(len(row) == 32 for row in samples.rows)
    places = [windows.index(row) for row in samples.rows]
    assert places == sorted(set(places))
    assert places[-1] > len(windows) // 2  # spread over the text
    assert samples.documents == 1
    assert samples.tokens == 512
    assert samples.sha256 == hashlib.sha256(book.read_bytes()).hexdigest()
    assert reporter.notes == ["calibration: 16 samples, 512 tokens from one running text (book.txt)"]


def test_all_windows_are_the_whole_text(book, tokenizer):
    stream = tokenizer(book.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    assert stream[0] == tokenizer.bos_token_id
    windows = windows_of(stream, 32)
    assert load(book, tokenizer, samples=len(windows), length=32).rows == windows


def test_seed(book, tokenizer):
    first = load(book, tokenizer, samples=8, length=32, seed=1, held_out=3)
    assert first == load(book, tokenizer, samples=8, length=32, seed=1, held_out=3)
    assert first.rows != load(book, tokenizer, samples=8, length=32, seed=2).rows


@pytest.mark.parametrize("packing", [True, False])
def test_held_out_rows_are_others_and_change_no_row(book, tokenizer, packing):
    samples = load(book, tokenizer, samples=8, length=32, held_out=5, packing=packing)
    assert len(samples.held_out) == 5
    assert not {tuple(row) for row in samples.rows} & {tuple(row) for row in samples.held_out}
    assert samples.rows == load(book, tokenizer, samples=8, length=32, packing=packing).rows


def test_held_out_ends_with_the_data(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("one text\nanother text\none text\n", encoding="utf-8")
    assert len(load(path, tokenizer, samples=1, held_out=9, packing=False).held_out) <= 2
    samples = load(path, tokenizer, samples=3, held_out=9, packing=False)
    assert samples.held_out == []
    path.write_text("one text\n" * 9, encoding="utf-8")
    assert load(path, tokenizer, samples=3, held_out=3, packing=False).held_out == []  # all are repetitions


def test_documents_are_concatenated_each_with_its_bos(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    rows = ["one text", "", "another text", "a third"]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    stream = [token for row in rows if row for token in tokenizer(row)["input_ids"]]
    samples = load(path, tokenizer, samples=len(stream) // 2, length=2)
    assert [token for row in samples.rows for token in row] == stream[: len(stream) // 2 * 2]
    assert stream.count(tokenizer.bos_token_id) == 3
    assert tokenizer.eos_token_id not in stream
    assert samples.documents == 3


def test_chat_has_one_bos(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi there"}]}) + "\n", encoding="utf-8")
    (row,) = load(path, tokenizer, samples=1, length=64, packing=False).rows
    assert tokenizer.decode(row) == "<s>[user]hi there"
    assert row.count(tokenizer.bos_token_id) == 1


def test_without_packing_a_text_is_a_row(tmp_path, tokenizer, bare, reporter):
    path = tmp_path / "a.txt"
    path.write_text("x\n\nThe quick brown fox\nand a dog jumps over a very long and lazy line\n", encoding="utf-8")
    samples = load(path, bare, samples=2, length=8, packing=False, reporter=reporter)
    long, short = sorted(samples.rows, key=len, reverse=True)
    assert len(long) == 8
    assert bare.decode(short) == "The quick brown fox"
    assert samples.documents == 3
    assert samples.tokens == 8 + len(short)
    assert reporter.notes[1:] == [
        "calibration: left out 1 empty texts",
        "calibration: left out 1 of the texts drawn: fewer than 2 tokens",
    ]


def test_an_encoder_keeps_its_closing_token(make_tokenizer):
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    (row,) = encode([Document("The quick brown fox jumps over it all")], tokenizer, length=5)
    assert len(row) == 5
    assert (row[0], row[-1]) == (0, 1)


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            {"samples": 64, "length": 8},
            [
                "error: calibration data holds {windows} samples of 8 tokens, 64 asked for",
                "  {path}: {tokens} tokens",
                "hint: use --samples {windows} or --length {fits}, or name more text",
            ],
        ),
        (
            {"samples": 20, "length": 2000},
            [
                "error: calibration data holds 0 samples of 2000 tokens, 20 asked for",
                "  {path}: {tokens} tokens",
                "hint: use --length {fits20}, or name more text",
            ],
        ),
        (
            {"samples": 64, "packing": False},
            [
                "error: calibration data holds 9 samples, 64 asked for",
                "  {path}: 9 texts, 0 of them with fewer than 2 tokens",
                "hint: use --samples 9, or name more text",
            ],
        ),
    ],
)
def test_too_few(tmp_path, tokenizer, options, lines):
    path = tmp_path / "a.txt"
    path.write_text("Numbers such as 1234 and a dog, a fox and zebras\n" * 9, encoding="utf-8")
    tokens = len(tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    with pytest.raises(LlmoptError) as caught:
        load(path, tokenizer, **options)
    assert caught.value.exit_code is ExitCode.FAILED
    expected = [
        line.format(path=path, tokens=tokens, windows=tokens // 8, fits=tokens // 64, fits20=tokens // 20)
        for line in lines
    ]
    assert str(caught.value).splitlines() == expected
    if options.get("packing", True):  # what the hint names is enough
        assert load(path, tokenizer, samples=options["samples"], length=tokens // options["samples"]).rows


def test_nothing_but_blank_lines(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("\n \n", encoding="utf-8")
    with pytest.raises(LlmoptError, match="holds 0 samples, 128 asked for") as caught:
        load(path, tokenizer, packing=False)
    assert caught.value.hint == "name more text"


# --- data larger than what is kept of it


@pytest.fixture
def small_budget(monkeypatch):
    monkeypatch.setattr(module, "CHARS_AT_LEAST", 1000)


def rows_file(path, count):
    path.write_text("".join(json.dumps({"text": f"text {n} of many"}) + "\n" for n in range(count)), encoding="utf-8")
    return path


def test_documents_kept_are_bounded_and_spread(tmp_path, tokenizer, small_budget):
    path = rows_file(tmp_path / "a.jsonl", 5000)
    generator = random.Random(0)
    drawn = module._draw(
        open_source(str(path)), tokenizer, generator, weigh=lambda d: len(d.text), budget=1000, running=False
    )
    size = sum(len(document.text) for _, _, document in drawn.documents)
    assert 1000 <= size < 1030
    assert drawn.seen == 5000
    assert not drawn.complete
    positions = [position for _, position, _ in drawn.documents]
    assert positions == sorted(positions)
    assert positions[0] < 500
    assert positions[-1] > 4500


def test_large_data_is_not_tokenized_whole(tmp_path, tokenizer, small_budget, monkeypatch):
    path = rows_file(tmp_path / "a.jsonl", 5000)
    encoded = []
    monkeypatch.setattr(
        module,
        "encode",
        lambda documents, *args, **options: encode((encoded.append(d) or d for d in documents), *args, **options),
    )
    samples = load(path, tokenizer, samples=4, length=8)
    assert samples.documents == 5000
    assert 50 < len(encoded) < 100
    assert samples == load(path, tokenizer, samples=4, length=8)
    assert samples.rows != load(path, tokenizer, samples=4, length=8, seed=1).rows


def test_more_is_drawn_if_it_holds_too_few_tokens(tmp_path, tokenizer, small_budget, monkeypatch):
    monkeypatch.setattr(module, "CHARS_PER_TOKEN", 1)  # too optimistic
    path = rows_file(tmp_path / "a.jsonl", 5000)
    assert len(load(path, tokenizer, samples=2000, length=8).rows) == 2000


def test_more_is_drawn_if_texts_are_too_short(tmp_path, bare):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 500 + '{"text": "long enough"}\n', encoding="utf-8")
    assert len(load(path, bare, samples=1, packing=False).rows) == 1


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text("abc xyz.\té漢", min_size=1, max_size=30), min_size=1, max_size=30),
    length=st.integers(2, 12),
    wanted=st.integers(1, 8),
    held_out=st.integers(0, 8),
    seed=st.integers(0, 2**32),
)
def test_packer(tokenizer, texts, length, wanted, held_out, seed):
    documents = [(0.0, position, Document(text)) for position, text in enumerate(texts)]
    drawn = module._Drawn(documents, len(texts), 0, complete=True, ended=True, sha256="")
    spec = CalibrationSpec(data="a.jsonl", samples=wanted, length=length)
    cut = module._pack(drawn, tokenizer, random.Random(seed), spec, held_out)
    stream = [token for text in texts for token in tokenizer(text)["input_ids"]]
    windows = windows_of(stream, length)
    assert cut.available == len(stream)
    assert len(cut.rows) == min(wanted, len(windows))
    assert len(cut.held_out) <= min(held_out, len(windows) - len(cut.rows))
    assert all(row in windows for row in cut.rows + cut.held_out)
    assert all(row not in cut.rows for row in cut.held_out)
    rest = iter(windows)
    assert all(row in rest for row in cut.rows)  # in their order, and no window twice
