"""Parameters, declared once.

A pass or an exporter declares its parameters as a frozen msgspec struct whose fields carry range and help text. The
command-line options, the recipe's JSON Schema and docs/passes.md are generated from it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
from msgspec import Meta

from .errors import UsageError, nearest

T = TypeVar("T")


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every parameter struct."""


Bits = Annotated[Literal[2, 3, 4, 5, 6, 8], Meta(description="Bits per weight.")]
GroupSizeParam = Annotated[
    Annotated[int, Meta(ge=1)] | Literal["channel", "tensor"],
    Meta(description="Weights along the input dimension that share a scale: a number, `channel` or `tensor`."),
]
Symmetric = Annotated[bool, Meta(description="Zero point fixed in the middle of the grid (no zero points stored).")]
Ignore = Annotated[
    tuple[str, ...],
    Meta(description="Layers to leave as they are: glob patterns (`*.down_proj`) or `re:` regular expressions."),
]


def convert(raw: Any, kind: type[T], *, where: str) -> T:
    """Check `raw` (plain data from a recipe or a command line) against a struct and build it.

    Args:
        raw: dicts, lists, strings, numbers.
        kind: the struct to build.
        where: the place to name in an error, such as ``pass 2 of 3, `gptq` ``.

    Raises:
        UsageError: an unknown field, a wrong type or a value out of range; it names the field.
    """
    if isinstance(raw, dict) and issubclass(kind, msgspec.Struct):
        known = kind.__struct_encode_fields__
        for key in cast("dict[Any, Any]", raw):
            if key not in known:
                hint = nearest(str(key), known) if known else None
                raise UsageError(f"unknown parameter `{key}`", where=where, hint=hint)
    try:
        return msgspec.convert(raw, kind, strict=True)
    except msgspec.ValidationError as error:
        raise UsageError("bad value in the parameters", where=f"{where}\n{describe(error)}") from None


def describe(error: msgspec.ValidationError) -> str:
    """Return msgspec's message with its path in words: `at bits: Invalid enum value 7`."""
    message, _, path = str(error).partition(" - at `")
    path = path.rstrip("`").removeprefix("$").lstrip(".")
    return f"at {path}: {message}" if path else message
