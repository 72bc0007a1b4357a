"""Tables and bars of the page."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from ...core.numbers import number
from .document import ExportEntry
from .markup import Child, Markup, element, joined

VERDICTS = {"passed": ("good", "✓ passed"), "failed": ("bad", "✕ failed"), "undecided": ("doubt", "? undecided")}


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[Child]],
    *,
    numbers: Collection[int] = (),
    wide: Collection[int] = (),
    kind: str = "stack",
) -> Markup:
    """Return a table whose first column names the rows.

    Args:
        header: names of the columns.
        rows: cells.
        numbers: the columns to align on the right.
        wide: the columns that hold sentences.
        kind: "stack", its rows become lists on a phone; "grid", it stays a table, scrolled where it must be; "tall",
            the same for many rows; "bars", its cells hold bars.
    """
    classes = ["number" if at in numbers else "wide" if at in wide else None for at in range(len(header))]
    top = [_cell("th", name, "columnheader", scope="col", class_=classes[at]) for at, name in enumerate(header)]
    body = [
        element(
            "tr",
            _cell("th", row[0], "rowheader", scope="row"),
            [
                _cell("td", cell, "cell", class_="none" if cell == "–" else classes[at], data_label=header[at])
                for at, cell in enumerate(row[1:], 1)
            ],
            role="row",
        )
        for row in rows
    ]
    made = element(
        "table",
        element("thead", element("tr", top, role="row"), role="rowgroup"),
        element("tbody", body, role="rowgroup"),
        class_={"bars": "bars stack", "tall": "grid"}.get(kind, kind),
        role="table",
    )
    name = f"Table: {', '.join(header[:3])}"
    scrolled = "scroll tall" if kind == "tall" else "scroll"
    return element("div", made, class_=scrolled, tabindex=0, role="region", aria_label=name)


def _cell(tag: str, content: Child, role: str, **attributes: object) -> Markup:
    """Return a cell; its role is told because a phone shows it as a block."""
    return element(tag, content, role=role, **attributes)


def counted(amount: int | None, what: str) -> str:
    """Return a number of things in words."""
    return f"{or_dash(amount, number)} {what}{'' if amount == 1 else 's'}"


def or_dash(value: Any, write: Callable[[Any], str]) -> str:
    """Return a value as `write` does, a dash where there is none."""
    return "–" if value is None else write(value)


def bar(text: str, value: float, most: float, class_: str | None = None) -> Markup:
    """Return a figure with a bar below it."""
    drawn = element("i", style=f"width:{100 * value / (most or 1):.1f}%", class_=class_)
    return joined(text, element("div", drawn, class_="bar", aria_hidden="true"))


def verdict(export: ExportEntry) -> Markup:
    """Return whether an export was verified, as a sign and a word."""
    if export.verification is None:
        return element("span", "? not verified", class_="doubt")
    kind, words = VERDICTS["passed" if export.verification["passed"] else "failed"]
    return element("span", words, class_=kind)
