"""Help texts, drawn by us: the same with every version of typer, readable without colour, rich not imported."""

from __future__ import annotations

import shutil
import textwrap
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

if TYPE_CHECKING:
    from collections.abc import Iterable

    import typer

_WIDEST = 100
_COLUMN = 30
"""Where descriptions begin; a longer left side puts its description on the next line."""

PANELS = ("Quantization", "Activations", "Mixed precision", "Calibration", "Model", "Output")
"""Headings of options, in the order in which they are shown; the rest comes last."""

Rows = list[tuple[str, str]]


class Command(TyperCommand):
    """A command with our help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of one command."""
        formatter.write(command_help(self, ctx, width()) + "\n")


def width() -> int:
    """Return the width to wrap at: the terminal's, within reason."""
    return max(40, min(shutil.get_terminal_size((80, 24)).columns, _WIDEST))


def command_help(command: Any, ctx: typer.Context, columns: int) -> str:
    """Return the help of one command."""
    arguments = [item for item in command.params if item.param_type_name == "argument"]
    options = [item for item in command.get_params(ctx) if item.param_type_name == "option" and not item.hidden]
    usage = " ".join([ctx.command_path, *(_argument(item) for item in arguments), "[OPTIONS]"])
    parts = [f"Usage: {usage}", paragraphs(command.help or "", columns)]
    if arguments:
        parts.append(section("Arguments", [(_argument(item), item.help or "") for item in arguments], columns))
    panels: dict[str, Rows] = {panel: [] for panel in PANELS}
    for option in options:
        panel = getattr(option, "rich_help_panel", None) or "Options"
        panels.setdefault(panel, []).append(_option(option))
    filled = {title: rows for title, rows in panels.items() if rows}
    general = filled.pop("Options", None)
    parts += [section(title, rows, columns) for title, rows in filled.items()]
    if general:
        parts.append(section("Other options" if filled else "Options", general, columns))
    return "\n\n".join(part for part in parts if part)


def section(title: str, rows: Rows, columns: int) -> str:
    """Return a heading with two columns below it."""
    lines = [f"{title}:"]
    column = min(_COLUMN, max(len(left) for left, _ in rows) + 4)
    for left, right in rows:
        wrapped = textwrap.wrap(right, max(20, columns - column)) or [""]
        if len(left) + 4 > column:
            lines.append(f"  {left}")
        else:
            lines.append(f"  {left:<{column - 2}}{wrapped.pop(0)}".rstrip())
        lines += [" " * column + line for line in wrapped]
    return "\n".join(lines)


def paragraphs(text: str, columns: int) -> str:
    """Wrap paragraphs; indented ones are examples and stay as they are."""
    blocks = textwrap.dedent(text).strip("\n").split("\n\n")
    return "\n\n".join(block if block.startswith("  ") else textwrap.fill(block, columns) for block in blocks)


def _argument(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required else f"[{name}]"


def _option(option: Any) -> tuple[str, str]:
    short = [name for name in option.opts if not name.startswith("--")]
    long = [name for name in option.opts if name.startswith("--")]
    names = ", ".join([*short, *long])
    if option.secondary_opts:
        names += " / " + _join(option.secondary_opts)
    if option.metavar and not option.is_flag:
        names += f" {option.metavar}"
    if option.multiple:
        names += " ..."
    help_text = "Show this help." if "--help" in option.opts else option.help or ""
    return names if short else f"    {names}", help_text


def _join(names: Iterable[str]) -> str:
    return ", ".join(names)
