"""Tables on narrow terminals."""

import pytest
from llmopt.cli import render
from llmopt.cli.render import Table, column_widths

ROWS = [("export", "opened with", "note"), ("onnx-genai", "onnxruntime-genai 0.18.0", "one two three four")]


@pytest.mark.parametrize(
    ("room", "widths"),
    [(80, [10, 24, 18]), (56, [10, 24, 18]), (50, [10, 18, 18]), (40, [10, 17, 9]), (36, [10, 17, 5]), (35, None)],
)
def test_columns_shrink_to_whole_words(room, widths):
    assert column_widths(ROWS, room) == widths


@pytest.mark.parametrize("columns", [120, 80, 50, 40])
def test_no_word_is_broken(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    render._draw_rich([Table("Verified", ROWS[0], ROWS[1:])])
    out = capsys.readouterr().out
    for word in ("onnx-genai", "onnxruntime-genai", "0.18.0", "one", "three"):
        assert word in out
    assert max(map(len, out.splitlines())) <= columns
