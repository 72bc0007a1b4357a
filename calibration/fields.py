"""Rows with several columns, each with a role: a question, its choices and the answer; two sentences and a score."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from ..core.errors import LlmoptError, UsageError, nearest
from .source import Source, open_source


@dataclass(frozen=True, slots=True)
class Role:
    """What a column is for.

    Attributes:
        name: how the role is called.
        usual: what such columns are commonly called, in order of preference.
        required: whether there must be one.
        several: a pattern of columns that play the role together, such as `A`, `B`, `C`, `D`; their values are a list.
    """

    name: str
    usual: tuple[str, ...]
    required: bool = True
    several: re.Pattern[str] | None = None


class Row(NamedTuple):
    """A row: where it stands, such as `line 12`, and its values by role."""

    place: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Fields:
    """Data whose columns have been given their roles.

    Attributes:
        source: the data.
        columns: for each role its columns; several where they play it together.
        unnamed: whether the file has no header, so that columns were taken by their order.
    """

    source: Source
    columns: Mapping[str, tuple[str, ...]]
    unnamed: bool = False

    def rows(self, limit: int | None = None) -> Iterator[Row]:
        """Yield the rows in order, at most `limit`.

        Raises:
            LlmoptError: the data is damaged, or a row lacks a column.
        """
        for place, values in islice(self.source.records(), limit):
            found: dict[str, Any] = {}
            for role, names in self.columns.items():
                missing = [name for name in names if name not in values]
                if missing:
                    raise LlmoptError(
                        f"no `{missing[0]}` in {place} of `{self.source.spec}`",
                        where=f"columns there: {', '.join(map(str, values)) or 'none'}",
                        hint="every row needs it, because the first has it; mend the row",
                    )
                found[role] = values[names[0]] if len(names) == 1 else [values[name] for name in names]
            yield Row(f"{place} of `{self.source.spec}`", found)


def first_columns(source: Source) -> list[str]:
    """Return the names of the columns.

    Raises:
        LlmoptError: there is no row.
    """
    first = next(iter(source.records()), None)
    if first is None:
        raise LlmoptError(f"`{source.spec}` holds no rows", hint="name a file with rows in it")
    return [str(name) for name in first.values]


def fitting(
    columns: Sequence[str], roles: Sequence[Role], named: Mapping[str, str]
) -> dict[str, tuple[str, ...]] | None:
    """Return the columns of each role: those that were named, else by their usual names; None where one is missing.

    Columns without names, 0, 1, 2 …, are taken in the order of the roles, where there are as many of them.
    """
    required = [role for role in roles if role.required]
    numbers = [str(place) for place in range(len(columns))]
    if list(columns) == numbers and not named and len(columns) in {len(required), len(roles)}:
        chosen_roles = required if len(columns) == len(required) else roles
        return {role.name: (name,) for role, name in zip(chosen_roles, columns, strict=True)}
    found: dict[str, tuple[str, ...]] = {}
    for role in roles:
        if role.name in named:
            chosen: tuple[str, ...] = tuple(part.strip() for part in named[role.name].split("+"))
        else:
            chosen = _usual(columns, role)
        if chosen and all(name in columns for name in chosen):
            found[role.name] = chosen
        elif role.required:
            return None
    return found


def _usual(columns: Sequence[str], role: Role) -> tuple[str, ...]:
    lower = {name.lower(): name for name in reversed(columns)}
    known = next((lower[name] for name in role.usual if name in lower), None)
    if known is not None:
        return (known,)
    together = [name for name in columns if role.several is not None and role.several.fullmatch(name)]
    return tuple(sorted(together)) if len(together) > 1 else ()


def open_fields(spec: str, roles: Sequence[Role], named: Mapping[str, str]) -> Fields:
    """Find data and the columns of each role; of the data only the first row is read.

    Args:
        spec: a file, or `hf:NAME[/CONFIG][:SPLIT]`.
        roles: what is needed.
        named: columns that the user named, by role; several are joined by `+`.

    Raises:
        UsageError: there is no such data, no such role or column, or a role's column cannot be told.
        LlmoptError: it is damaged or has no rows.
    """
    source = open_source(spec)
    known = [role.name for role in roles]
    for name in named:
        if name not in known:
            raise UsageError(
                f"no column is called for as `{name}`", where=f"--column {name}=…", hint=nearest(name, known)
            )
    columns = first_columns(source)
    for name, chosen in named.items():
        for part in chosen.split("+"):
            if part.strip() not in columns:
                where = f"columns: {', '.join(columns)}"
                hint = nearest(part.strip(), columns)
                raise UsageError(f"no column `{part.strip()}` in `{spec}`, for {name}", where=where, hint=hint)
    found = fitting(columns, roles, named)
    if found is None:
        missing = [role for role in roles if role.required and fitting(columns, [role], {}) is None]
        lacking = next((role for role in missing if role.name not in named), roles[0])
        meant = "" if len(roles) == 1 else f"{lacking.name}="
        raise UsageError(
            f"cannot tell which column of `{spec}` holds the {lacking.name}",
            where=f"columns: {', '.join(columns)}",
            hint=f"name it with --column {meant}NAME; found by itself: {', '.join(lacking.usual[:6])}",
        )
    return Fields(source, found, unnamed=columns == [str(place) for place in range(len(columns))] and not named)
