"""The passes and exporters there are, as data: for `llmopt passes` and for the generated documentation."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from ..core.errors import UsageError, nearest
from .parameters import Parameter, parameters


@dataclass(frozen=True, slots=True)
class Entry:
    """A pass or an exporter.

    Attributes:
        name: its name in recipes.
        kind: "pass" or "export".
        summary: the first line of its docstring.
        description: the rest of the docstring, in paragraphs.
        facts: what else there is to know, such as (needs, calibration).
        parameters: its parameters.
    """

    name: str
    kind: str
    summary: str
    description: str
    facts: tuple[tuple[str, str], ...]
    parameters: tuple[Parameter, ...]

    def to_dict(self) -> dict[str, Any]:
        """Render for `--json`."""
        return {
            "name": self.name,
            "kind": self.kind,
            "summary": self.summary,
            "description": self.description,
            **dict(self.facts),
            "parameters": [
                {
                    "name": item.name,
                    "type": item.words.replace("`", ""),
                    "required": item.required,
                    "default": item.default,
                    "description": item.description,
                }
                for item in self.parameters
            ],
        }


def catalog() -> list[Entry]:
    """Return every pass, then every exporter, as registered."""
    from ..exporters import EXPORTERS
    from ..passes import PASSES

    passes = [_pass(name, PASSES.load(name)) for name in PASSES]
    return [*passes, *(_export(name, EXPORTERS.load(name)) for name in EXPORTERS)]


def find(name: str) -> list[Entry]:
    """Return the pass or the exporter called `name`, or both.

    Raises:
        UsageError: there is none.
    """
    entries = catalog()
    found = [entry for entry in entries if entry.name == name]
    if not found:
        raise UsageError(f"unknown pass or exporter `{name}`", hint=nearest(name, {entry.name for entry in entries}))
    return found


def _pass(name: str, cls: Any) -> Entry:
    facts = []
    if cls.needs:
        facts.append(("needs", ", ".join(sorted(str(need) for need in cls.needs))))
    if cls.not_after:
        facts.append(("not_after", ", ".join(sorted(cls.not_after))))
    return _entry(name, "pass", cls, facts)


def _export(name: str, cls: Any) -> Entry:
    return _entry(name, "export", cls, [("opened_with", cls.runtime)])


def _entry(name: str, kind: str, cls: Any, facts: list[tuple[str, str]]) -> Entry:
    text = inspect.cleandoc(cls.__doc__ or "")
    summary, _, description = text.partition("\n\n")
    return Entry(name, kind, " ".join(summary.split()), description.strip(), tuple(facts), parameters(cls.Params))
