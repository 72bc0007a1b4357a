"""The only file that draws on the terminal: results on stdout, progress and messages on stderr.

Results arrive as sections, which are data. With a terminal they are drawn with rich, otherwise as aligned text.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from ..core.ends import undone_by
from ..core.numbers import seconds
from ..core.progress import Reporter, Silent, Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a header; `right` holds the columns that are numbers."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    right: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Pairs:
    """Names with their values."""

    title: str
    items: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines of text; wrapped, unless they are code."""

    title: str
    lines: Sequence[str]
    code: bool = False


Section = Table | Pairs | Lines


class Screen:
    """Where one command shows what it has to show.

    Args:
        json: print one JSON document instead of text.
        quiet: print neither progress nor summaries.
        verbose: report progress in more detail.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self._json = json
        self._quiet = quiet
        self.reporter = reporter(quiet=quiet, verbose=verbose)

    def show(self, sections: Iterable[Section], data: Any, *, summary: bool = False) -> None:
        """Print a result.

        Args:
            sections: the result for people.
            data: the same for programs.
            summary: the result only sums up what lies on disk now, so `--quiet` leaves it out.
        """
        if self._json:
            _print_json(data)
        elif self._quiet and summary:
            return
        elif sys.stdout.isatty():
            _draw_rich(list(sections))
        else:
            print("\n\n".join(as_text(section) for section in sections))


def reporter(*, quiet: bool, verbose: bool) -> Reporter:
    """Return what reports progress: a live bar with a terminal, plain lines otherwise, nothing when quiet."""
    if quiet:
        return Silent()
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return _Live()
    return PlainReporter(sys.stderr, every_unit=verbose)


# Results


def _print_json(data: Any) -> None:
    import msgspec

    def plain(value: Any) -> Any:
        item = getattr(value, "item", None)
        return item() if callable(item) else str(value)

    print(msgspec.json.format(msgspec.json.encode(data, enc_hook=plain), indent=2).decode())


def as_text(section: Section) -> str:
    """Return a section as aligned text without colour, one row a line."""
    lines = [section.title] if section.title else []
    indent = "  " if section.title else ""
    if isinstance(section, Lines):
        return "\n".join([*lines, *(indent + line for line in section.lines)])
    rows = [list(row) for row in (section.rows if isinstance(section, Table) else section.items)]
    if isinstance(section, Table):
        rows.insert(0, [name.upper() for name in section.header])
    right = section.right if isinstance(section, Table) else frozenset[int]()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def _draw_rich(sections: list[Section]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=False)
    for index, section in enumerate(sections):
        if index:
            console.print()
        if section.title:
            console.print(Text(section.title, style="bold"))
        indent = (0, 0, 0, 2 if section.title else 0)
        if isinstance(section, Lines):
            for line in section.lines:
                # Code is printed as it is, so that it can be copied from the terminal in one piece.
                console.print(" " * indent[3] + line if section.code else Padding(Text(line), indent), markup=False)
        elif isinstance(section, Pairs):
            console.print(Padding(_rich_table(section, []), indent))
        elif (widths := column_widths([section.header, *section.rows], console.width - indent[3])) is not None:
            console.print(Padding(_rich_table(section, widths), indent))
        else:
            for row in section.rows:  # too narrow for columns: one row below the other
                console.print(Padding(Text(row[0]), indent))
                pairs = Pairs("", list(zip(section.header[1:], row[1:], strict=True)))
                console.print(Padding(_rich_table(pairs, []), (0, 0, 0, indent[3] + 2)))


def column_widths(rows: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """Return widths of columns, two apart, that fit into `room` without breaking a word; None if there are none."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    least = [max(len(word) for cell in column for word in [*cell.split(), ""]) for column in columns]
    for _ in range(sum(widths) + 2 * (len(widths) - 1) - room):
        at = max(range(len(widths)), key=lambda index: widths[index] * (widths[index] > least[index]))
        if widths[at] == least[at]:
            return None
        widths[at] -= 1
    return widths


def _rich_table(section: Table | Pairs, widths: list[int]) -> Any:
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=isinstance(section, Table))
    if isinstance(section, Table):
        for index, name in enumerate(section.header):
            justify = "right" if index in section.right else "left"
            table.add_column(name.upper(), justify=justify, overflow="fold", width=widths[index])
        rows: Sequence[Sequence[str]] = section.rows
    else:
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        rows = section.items
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


# Progress


class PlainReporter:
    """Progress as lines: at the start, about every ten percent but at most every five seconds, and at the end.

    Work inside other work says how far it is only when it takes long.

    Args:
        stream: where to write.
        every_unit: write a line for every unit.
        clock: seconds that only ever grow.
    """

    def __init__(self, stream: TextIO, *, every_unit: bool = False, clock: Any = time.monotonic) -> None:
        self._stream = stream
        self._every_unit = every_unit
        self._clock = clock
        self._open = 0

    @contextmanager
    def step(self, title: str, total: int) -> Iterator[Step]:
        """Open a piece of long work."""
        step = _PlainStep(title, total, self._write, self._clock, every_unit=self._every_unit)
        if self._open == 0:
            self._write(f"{title}: 0/{total}" if total > 1 else f"{title}...")
        self._open += 1
        try:
            yield step
        finally:
            self._open -= 1
        if self._open == 0:
            self._write(step.ending())

    def note(self, message: str) -> None:
        """Say something once."""
        self._write(f"note: {message}")

    def warn(self, message: str) -> None:
        """Say something that the user should not miss."""
        self._write(f"warning: {message}")

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class _PlainStep:
    def __init__(self, title: str, total: int, write: Any, clock: Any, *, every_unit: bool) -> None:
        self._title, self._total, self._write, self._clock, self._every_unit = title, total, write, clock, every_unit
        self._begun = self._said_at = clock()
        self._done = self._said = 0

    def advance(self, amount: int = 1, *, detail: str = "") -> None:
        self._done += amount
        now = self._clock()
        waited, gained = now - self._said_at, self._done - self._said
        due = (waited >= 5 and 10 * gained >= self._total) or waited >= 60 or self._every_unit
        if not due or self._done >= self._total:
            return
        self._said_at, self._said = now, self._done
        left = (now - self._begun) / self._done * (self._total - self._done)
        where = f", {detail}" if detail else ""
        percent = 100 * self._done // self._total
        self._write(f"{self._title}: {self._done}/{self._total} ({percent} %), {seconds(left)} left{where}")

    def ending(self) -> str:
        count = f" {self._done}/{self._total}" if self._total > 1 else ""
        return f"{self._title}:{count} done in {seconds(self._clock() - self._begun)}"


class _Live:
    """Progress as a live display, one line for each open piece of work; a line remains of each that is done."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._open = 0
        self._console: Console | None = None

    @contextmanager
    def step(self, title: str, total: int) -> Iterator[Step]:
        """Open a piece of long work."""
        if self._open == 0:
            self._progress = _progress(self._stderr())
        self._open += 1
        begun, task = time.monotonic(), None
        try:  # a signal may come as soon as the first line is drawn
            self._progress.start()
            task = self._progress.add_task(title, total=total or 1, detail="")
            with undone_by(self._progress.stop):
                yield _LiveStep(self._progress, task)
            if self._open == 1:
                self._say(f"{title}: done in {seconds(time.monotonic() - begun)}", "dim")
        finally:
            if task is not None:
                self._progress.remove_task(task)
            self._open -= 1
            if self._open == 0:
                self._progress.stop()

    def note(self, message: str) -> None:
        """Say something once."""
        self._say(f"note: {message}", "")

    def warn(self, message: str) -> None:
        """Say something that the user should not miss."""
        self._say(f"warning: {message}", "yellow")

    def _say(self, line: str, style: str) -> None:
        from rich.text import Text

        self._stderr().print(Text(line, style=style))

    def _stderr(self) -> Console:
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False)
        return self._console


class _LiveStep:
    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: int = 1, *, detail: str = "") -> None:
        self._progress.update(self._task, advance=amount, detail=detail)


def _progress(console: Console) -> Any:
    """Return the live display; a narrow terminal gets a short bar and no detail."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12 if console.width < 100 else 24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    ]
    if console.width >= 72:
        columns.append(TextColumn("{task.fields[detail]}", markup=False, table_column=Column(ratio=1, no_wrap=True)))
    return Progress(*columns, console=console, transient=True, expand=True)
