"""Calibration data that is missing, empty, too short, of another shape, or no text."""

import pytest
from broken import TINY

ARGUMENTS = ("quantize", TINY, "--group-size", "64")


def test_missing(shell):
    (shell.folder / "wiki.txt").write_text("text")
    shell.builds_nothing(
        *ARGUMENTS, "--calibration", "wikki.txt", code=2, what="no file `wikki.txt`", hint="did you mean `wiki.txt`?"
    )


def test_a_folder(shell):
    shell.builds_nothing(*ARGUMENTS, "--calibration", ".", code=2, what="`.` is a folder", hint="hf:.")


FILES = {
    "empty": ("c.txt", "", (), 1, "`c.txt` is empty", "name a file with text in it"),
    "blank": ("c.txt", "\n \n\n", (), 1, "calibration data holds 0 samples of 512 tokens, 128 asked for", "more text"),
    "too-short": (
        "c.txt",
        "The hen lays an egg. " * 20,
        ("--samples", "64", "--length", "32"),
        1,
        " samples of 32 tokens, 64 asked for",
        "use --samples ",
    ),
    "one-row": (
        "c.jsonl",
        '{"text": "The hen lays an egg."}\n',
        ("--no-packing", "--samples", "4"),
        1,
        "calibration data holds 1 sample, 4 asked for",
        "use --samples 1, or name more text",
    ),
    "not-utf-8": ("c.txt", b"hello \xff\xfe world", (), 1, "`c.txt` is not UTF-8", "iconv -f latin1 -t utf-8 c.txt"),
    "utf-16": ("c.txt", "hello".encode("utf-16"), (), 1, "`c.txt` is not UTF-8", "iconv -f utf-16 -t utf-8 c.txt"),
    "no-column": ("c.csv", "a,b\n1,x\n", ("--column", "text"), 2, "no column `text` in `c.csv`", "known: a, b"),
    "several-columns": (
        "c.jsonl",
        '{"a": "x y", "b": "z w"}\n',
        (),
        2,
        "cannot tell which column of `c.jsonl` holds the text",
        "name it with --column",
    ),
    "column-of-a-text": ("c.txt", "x", ("--column", "text"), 2, "no column `text`", "leave --column out"),
    "numbers": ("c.csv", "n\n1\n2\n", ("--column", "m"), 2, "no column `m`", "known: n"),
    "no-json": ("c.jsonl", "{nope\n", (), 1, "line 1 of `c.jsonl` is no JSON", "one object a line"),
    "no-parquet": ("c.parquet", b"PAR1 and no more", (), 1, "cannot read `c.parquet` as Parquet", "download the file"),
    "ragged": ("c.csv", "text,n\nhello, world, 1\n", (), 1, "line 2 of `c.csv` has 3 columns", 'in "quotes"'),
    "no-template": (
        "c.jsonl",
        '{"messages": [{"role": "nobody"}]}\n',
        (),
        1,
        "the chat template refuses the messages",
        "mend the row",
    ),
    "unknown-kind": ("c.docx", "text", (), 2, "unknown kind of data `c.docx`", "known: .txt, .jsonl, .csv, .parquet"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file(shell, case):
    name, content, options, code, what, hint = FILES[case]
    (shell.folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    shell.builds_nothing(*ARGUMENTS, "--calibration", name, *options, code=code, what=what, hint=hint)


def test_samples_longer_than_the_context(shell):
    shell.builds_nothing(
        *ARGUMENTS,
        *("--calibration", TINY / "calibration.txt", "--samples", "4", "--length", "1024"),
        code=2,
        what="samples of 1024 tokens are longer than the context",
        hint="use --length 512 or less",
    )


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        (("--method", "gptq"), "--method gptq needs calibration data", "name it with --calibration SPEC, or use rtn"),
        (("--samples", "8"), "--samples needs calibration data", "name it with --calibration SPEC"),
        (("--calibration", "hf:"), "cannot read `hf:` as a data set", "write hf:NAME[/CONFIG][:SPLIT]"),
    ],
)
def test_none_where_some_is_needed(shell, options, what, hint):
    shell.builds_nothing(*ARGUMENTS, *options, code=2, what=what, hint=hint)
