"""`llmopt passes`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import Json, Verbose, open_screen

if TYPE_CHECKING:
    from .catalog import Entry
    from .render import Section


def command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A pass or an exporter to describe.")] = None,
    *,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """List the passes and exporters, or describe one."""
    from .catalog import catalog, find

    screen = open_screen(json=json, quiet=False, verbose=verbose)
    if name is None:
        entries = catalog()
        screen.show(_list(entries), [entry.to_dict() for entry in entries])
        return
    entries = find(name)
    sections = [section for entry in entries for section in _describe(entry)]
    screen.show(sections, entries[0].to_dict() if len(entries) == 1 else [entry.to_dict() for entry in entries])


def _list(entries: list[Entry]) -> list[Section]:
    from .render import Pairs

    return [
        Pairs(title, [(entry.name, entry.summary) for entry in entries if entry.kind == kind])
        for title, kind in (("Passes", "pass"), ("Exporters", "export"))
    ]


def _describe(entry: Entry) -> list[Section]:
    from .render import Lines, Pairs, Table

    paragraphs = [" ".join(block.split()) for block in entry.description.split("\n\n") if block]
    sections: list[Section] = [Lines(f"{entry.name} ({entry.kind})", [entry.summary, *paragraphs])]
    if entry.facts:
        sections.append(Pairs("", [(name.replace("_", " "), text) for name, text in entry.facts]))
    if entry.parameters:
        rows = [
            (
                item.name,
                item.words.replace("`", ""),
                "required" if item.required else item.default_text or "-",
                item.description,
            )
            for item in entry.parameters
        ]
        sections.append(Table("Parameters", ("name", "type", "default", "description"), rows))
    return sections
