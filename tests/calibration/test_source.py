"""Reading texts: what is read from each kind of data, and every error with its place and its hint."""

from __future__ import annotations

import codecs
import csv
import json
import subprocess
import sys

import pytest
from llmopt.calibration import files
from llmopt.calibration.source import open_source
from llmopt.core.errors import ExitCode, LlmoptError, UsageError


def texts(spec, tokenizer, column=None, *, running=False):
    return [document.text for document in open_source(str(spec), column).documents(tokenizer, running=running)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(spec, tokenizer, column=None, *, running=False):
    with pytest.raises(LlmoptError) as caught:
        texts(spec, tokenizer, column, running=running)
    return caught.value


# --- plain text


def test_running_text_is_the_whole_file(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_bytes(codecs.BOM_UTF8 + "one\r\n\n  two\u2028é ".encode())
    assert texts(path, tokenizer, running=True) == ["one\n\n  two\u2028é "]


def test_lines_are_texts(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\u2028 and more\nthree", encoding="utf-8")
    assert texts(path, tokenizer) == ["one", "", "two\u2028 and more", "three"]


@pytest.mark.parametrize(
    "text", ["word " * 30_000, "x" * 150_000, "é\n" * 90_000, ("a line of text\n" * 20_000)], ids=len
)
def test_blocks_join_to_the_text(tmp_path, tokenizer, text):
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    source = open_source(str(path))
    blocks = list(source.documents(tokenizer, running=True))
    assert "".join(block.text for block in blocks) == text
    assert len(blocks) > 1
    assert [block.special for block in blocks] == [True] + [False] * (len(blocks) - 1)
    assert all(block.text[-1].isspace() for block in blocks) or text[0] == "x"


def test_only_the_first_block_is_read_for_the_first_block(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("a line of text\n" * 40_000, encoding="utf-8")
    decoded = []
    chunks = files._chunks
    monkeypatch.setattr(files, "_chunks", lambda path: (decoded.append(1) or chunk for chunk in chunks(path)))
    next(open_source(str(path)).documents(tokenizer, running=True))
    assert len(decoded) <= 2


# --- rows


def test_jsonl_layouts(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    write_rows(path, [{"id": 1, "text": "one"}, {"text": None}, {"text": "two"}])
    assert texts(path, tokenizer) == ["one", "", "two"]
    write_rows(path, [{"prompt": "2+2=", "completion": "4"}])
    assert texts(path, tokenizer) == ["2+2=4"]
    write_rows(path, [{"id": 7, "body": "the only text"}])
    assert texts(path, tokenizer) == ["the only text"]
    write_rows(path, [{"text": "not this", "body": "this"}])
    assert texts(path, tokenizer, "body") == ["this"]
    path.write_text('\n{"text": "after a blank line"}\n\n', encoding="utf-8")
    assert texts(path, tokenizer) == ["after a blank line"]


def test_messages_go_through_the_chat_template_which_writes_the_special_tokens(tmp_path, tokenizer):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = write_rows(tmp_path / "a.jsonl", [{"messages": talk}, {"messages": []}])
    documents = list(open_source(str(path)).documents(tokenizer, running=False))
    assert documents[0] == ("<s>[user]hi[assistant]ho", False)
    assert documents[1].text == ""
    path = write_rows(tmp_path / "b.jsonl", [{"prompt": talk[:1], "completion": talk[1:]}])
    assert texts(path, tokenizer) == ["<s>[user]hi[assistant]ho"]
    path = write_rows(tmp_path / "c.jsonl", [{"talk": talk}])
    assert texts(path, tokenizer, "talk") == ["<s>[user]hi[assistant]ho"]


def test_csv(tmp_path, tokenizer):
    path = tmp_path / "a.csv"
    path.write_text('score,sentence\n5,"one, ""quoted"""\n\n3,two\n', encoding="utf-8")
    assert texts(path, tokenizer) == ['one, "quoted"', "two"]  # the only column of text
    assert texts(path, tokenizer, "score") == ["5", "3"]
    assert texts(path, tokenizer, "1") == ["sentence", 'one, "quoted"', "two"]  # a number: there is no header
    long = "word " * 50_000
    path.write_text(f"text,n\n{long},1\n", encoding="utf-8")
    limit = csv.field_size_limit()
    assert texts(path, tokenizer) == [long]
    assert csv.field_size_limit() == limit


def test_parquet_reads_only_the_column(tmp_path, tokenizer, monkeypatch):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    talk = [[{"role": "user", "content": "hi"}]] * 3000
    parquet.write_table(pa.table({"n": range(3000), "text": [f"row {n}" for n in range(3000)], "messages": talk}), path)
    asked = []
    plain = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile,
        "iter_batches",
        lambda self, size, columns: asked.append(columns) or plain(self, size, columns=columns),
    )
    assert texts(path, tokenizer) == [f"row {n}" for n in range(3000)]
    assert asked == [["text"]]
    assert texts(path, tokenizer, "messages")[0] == "<s>[user]hi"
    assert refusal(path, tokenizer, "txt").hint == "did you mean `text`?"
    assert refusal(path, tokenizer, "n").what == f"`n` in row 1 of `{path}` is no text"


# --- what is refused


def test_missing_file(tmp_path, tokenizer, book):
    error = refusal(tmp_path / "bok.txt", tokenizer)
    assert isinstance(error, UsageError)
    assert error.exit_code is ExitCode.USAGE
    assert error.what == f"no file `{tmp_path / 'bok.txt'}`"
    assert error.where == f"looked in {tmp_path}"
    assert error.hint == f"did you mean `{book}`?"


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("nowhere/valid.txt", "there is no folder `nowhere` either"),
        ("salesforce/wikitext", "a data set on the hub is written hf:salesforce/wikitext"),
        ("zzzzzzzz.csv", "name a file of kind .txt, .jsonl, .csv, .parquet, or hf:NAME"),
    ],
)
def test_missing_file_hints(tmp_path, monkeypatch, tokenizer, spec, hint):
    monkeypatch.chdir(tmp_path)
    assert refusal(spec, tokenizer).hint == hint


def test_folder(tmp_path, tokenizer, book):
    error = refusal(tmp_path, tokenizer)
    assert isinstance(error, UsageError)
    assert error.what == f"`{tmp_path}` is a folder"
    assert error.hint == f"name a file in it: {book}"
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty", tokenizer).hint == f"read it as a data set: hf:{tmp_path / 'empty'}"


def test_unknown_suffix(tmp_path, tokenizer):
    path = tmp_path / "a.json"
    path.write_text("[]", encoding="utf-8")
    error = refusal(path, tokenizer)
    assert isinstance(error, UsageError)
    assert error.what == f"unknown kind of data `{path}`"
    assert error.where == "suffix: .json"
    assert error.hint == f"known: .txt, .jsonl, .csv, .parquet, or read it through `datasets`: hf:{path}"


def test_empty_file(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.touch()
    error = refusal(path, tokenizer)
    assert error.exit_code is ExitCode.FAILED
    assert (error.what, error.where) == (f"`{path}` is empty", "0 bytes")


@pytest.mark.parametrize("pad", [0, 70_000])
def test_not_utf8(tmp_path, tokenizer, pad):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xc3\xa9\n" * (pad // 3) + b"one\ntwo caf\xe9 latte\n")
    error = refusal(path, tokenizer, running=True)
    assert error.exit_code is ExitCode.FAILED
    assert error.what == f"`{path}` is not UTF-8"
    assert error.where == f"byte {pad // 3 * 3 + 11}, line {pad // 3 + 2}: 0xe9"
    assert error.hint == "convert it, for example with: iconv -f latin1 -t utf-8 a.txt"


def test_not_utf8_but_utf16_or_cut_short(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("one", encoding="utf-16")
    error = refusal(path, tokenizer)
    assert error.where == "byte 0, line 1: 0xff"
    assert "iconv -f utf-16" in error.hint
    path.write_bytes("one\né".encode()[:-1])
    assert refusal(path, tokenizer).where == "byte 4, line 2: 0xc3"


def test_unreadable_file(book, tokenizer, monkeypatch):
    source = open_source(str(book))
    book.unlink()
    with pytest.raises(LlmoptError, match=f"cannot read `{book}`") as caught:
        list(source.documents(tokenizer, running=True))
    assert caught.value.where == "No such file or directory"


def test_column_of_a_text(book, tokenizer):
    error = refusal(book, tokenizer, "text")
    assert isinstance(error, UsageError)
    assert error.where == "a .txt file has no columns"


def test_wrong_column(tmp_path, tokenizer):
    path = tmp_path / "a.csv"
    path.write_text("score,sentence,other\n5,one,eins\n", encoding="utf-8")
    error = refusal(path, tokenizer, "sentences")
    assert isinstance(error, UsageError)
    assert str(error).splitlines() == [
        f"error: no column `sentences` in `{path}`",
        "  columns: score, sentence, other",
        "hint: did you mean `sentence`?",
    ]
    error = refusal(path, tokenizer)
    assert isinstance(error, UsageError)
    assert error.what == f"cannot tell which column of `{path}` holds the text"
    assert error.hint == "name it with --column, by number if there is no header"
    assert refusal(path, tokenizer, "3").where == "columns: 0, 1, 2"


def test_csv_that_is_damaged(tmp_path, tokenizer):
    path = tmp_path / "a.csv"
    path.write_text("n,text\n1,one\n2,two, and more\n", encoding="utf-8")
    error = refusal(path, tokenizer)
    assert error.what == f"line 3 of `{path}` has 3 columns"
    assert error.where == "the first line has 2: n, text"
    path.write_text('n,text\n1,one\n2,"two\n3,three\n', encoding="utf-8")
    error = refusal(path, tokenizer)
    assert error.what == f"cannot read line 4 of `{path}` as CSV"
    assert error.where == "unexpected end of data"
    assert error.exit_code is ExitCode.FAILED


@pytest.mark.parametrize(
    ("line", "what", "hint"),
    [
        ('{"text": "two"', "line 2 of `{path}` is no JSON", "a .jsonl file holds one object a line"),
        ('["two"]', "line 2 of `{path}` is no object", 'a row looks like {{"text": "…"}}'),
        ('{"body": "two"}', "no `text` in line 2 of `{path}`", "every row needs it"),
        ('{"text": 2}', "`text` in line 2 of `{path}` is no text", "name a column of text"),
        ('{"text": ["two"]}', "no chat messages in line 2 of `{path}`", "a message is an object with `role`"),
        (
            '{"text": [{"role": "nobody", "content": "two"}]}',
            "the chat template refuses the messages in line 2 of `{path}`",
            "mend the row",
        ),
    ],
)
def test_bad_row(tmp_path, tokenizer, line, what, hint):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' + line + "\n", encoding="utf-8")
    error = refusal(path, tokenizer)
    assert error.exit_code is ExitCode.FAILED
    assert error.what == what.format(path=path)
    assert error.hint.startswith(hint.format(path=path))
    assert error.where


def test_messages_without_chat_template(tmp_path, bare):
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    error = refusal(path, bare)
    assert error.what == f"cannot render the messages in line 1 of `{path}`"
    assert error.where == "the model's tokenizer has no chat template"
    assert error.hint.startswith("name a column of plain text with --column")


def test_damaged_parquet(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 this is none")
    error = refusal(path, tokenizer)
    assert error.what == f"cannot read `{path}` as Parquet"
    assert error.exit_code is ExitCode.FAILED


def test_a_refusal_imports_nothing_heavy():
    code = (
        "import sys\nfrom llmopt.calibration.source import open_source\nimport llmopt.calibration.samples\n"
        "try: open_source('no/such.txt')\nexcept Exception as error: print(error.what)\n"
        "assert not {'numpy', 'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "no file `no/such.txt`\n"
