"""Progress without a terminal: lines, and not too many."""

import io

import pytest
from llmopt.cli.render import Lines, Pairs, PlainReporter, Table, as_text, reporter
from llmopt.core.progress import Silent


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def written():
    return io.StringIO()


def work(show, clock, *, units, each):
    with show.step("gptq", units) as step:
        for index in range(units):
            clock.now += each
            step.advance(detail=f"layers.{index}")


def test_quick_work_is_two_lines(clock, written):
    work(PlainReporter(written, clock=clock), clock, units=100, each=0.01)
    assert written.getvalue().splitlines() == ["gptq: 0/100", "gptq: 100/100 done in 1.0 s"]


def test_long_work_says_how_far_and_how_long_still(clock, written):
    work(PlainReporter(written, clock=clock), clock, units=20, each=10)
    lines = written.getvalue().splitlines()
    assert lines[1] == "gptq: 2/20 (10 %), 3 min 00 s left, layers.1"
    assert len(lines) == 11
    assert lines[-1] == "gptq: 20/20 done in 3 min 20 s"


def test_very_long_work_gives_a_sign_every_minute(clock, written):
    work(PlainReporter(written, clock=clock), clock, units=40, each=61)
    assert len(written.getvalue().splitlines()) == 41


def test_verbose_shows_every_unit(clock, written):
    work(PlainReporter(written, clock=clock, every_unit=True), clock, units=5, each=0.01)
    assert len(written.getvalue().splitlines()) == 6


def test_work_inside_work_is_silent_when_short(clock, written):
    show = PlainReporter(written, clock=clock)
    with show.step("sweep", 2) as outer:
        for _ in range(2):
            work(show, clock, units=5, each=0.1)
            outer.advance()
    assert written.getvalue().splitlines() == ["sweep: 0/2", "sweep: 2/2 done in 1.0 s"]


def test_failed_work_is_not_called_done(clock, written):
    show = PlainReporter(written, clock=clock)
    with pytest.raises(ValueError, match="broken"), show.step("load", 1):
        raise ValueError("broken")
    show.note("after")
    work(show, clock, units=1, each=1)
    assert written.getvalue().splitlines() == ["load...", "note: after", "gptq...", "gptq: done in 1.0 s"]


def test_which_reporter(monkeypatch):
    assert isinstance(reporter(quiet=True, verbose=False), Silent)
    assert isinstance(reporter(quiet=False, verbose=False), PlainReporter)


def test_text_is_aligned_and_has_no_trailing_blanks():
    table = Table("Sizes", ("name", "size"), [("a", "10 KiB"), ("longer", "9 B")], frozenset({1}))
    assert as_text(table) == "Sizes\n  NAME      SIZE\n  a       10 KiB\n  longer     9 B"
    assert as_text(Pairs("", [("a", "1"), ("long", "2")])) == "a     1\nlong  2"
    assert as_text(Lines("To load it", ["x"], code=True)) == "To load it\n  x"
    assert as_text(Pairs("Nothing", [])) == "Nothing"


def test_drawn_with_rich_without_colour(monkeypatch, capsys):
    from llmopt.cli.render import _draw_rich

    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    long = "a sentence that is longer than a narrow terminal is wide"
    _draw_rich([Pairs("Title", [("name", long)]), Lines("Code", ["x" * 60], code=True), Table("T", ("a",), [["[b]1"]])])
    out = capsys.readouterr().out
    assert "\x1b[3" not in out
    assert "x" * 60 not in out or "x" * 60 in out.replace("\n", "")
    assert "[b]1" in out
    assert " ".join(long.split()[:3]) in out
