"""Parameters, declared once.

A pass or an exporter declares its parameters as a frozen msgspec struct whose fields carry range and help text. The
command-line options, the recipe's JSON Schema and docs/passes.md are generated from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
from msgspec import Meta

from .errors import UsageError, nearest

T = TypeVar("T")


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every parameter struct."""


NumberParam = Annotated[
    Literal["int", "fp8", "nvfp4", "mxfp4"],
    Meta(
        description="What a code stands for: an integer, or a small floating-point number: `fp8` (e4m3), `nvfp4` "
        "(e2m1, 16 weights share a scale in e4m3) or `mxfp4` (e2m1, 32 weights share a power of two)."
    ),
]
Bits = Annotated[
    Literal[2, 3, 4, 5, 6, 8] | None,
    Meta(description="Bits per weight; 4 for integers when not given, and fixed for other numbers."),
]
GroupSizeParam = Annotated[
    Annotated[int, Meta(ge=1)] | Literal["channel", "tensor", "block"] | None,
    Meta(
        description="Weights along the input dimension that share a scale: a number, `channel` or `tensor`, or `block` "
        "(128 x 128, fp8 only). When not given 128 for integers, `channel` for fp8."
    ),
]
Symmetric = Annotated[bool, Meta(description="Zero point fixed in the middle of the grid (no zero points stored).")]
MaxDrop = Annotated[
    float,
    Meta(
        gt=0,
        le=1,
        description="How much of the outputs may be lost, as mean 1 - cosine: the verification refuses more.",
    ),
]

Ignore = Annotated[
    tuple[str, ...],
    Meta(description="Layers to leave as they are: glob patterns (`*.down_proj`) or `re:` regular expressions."),
]


class Override(Params, frozen=True, kw_only=True):
    """Another grid for the layers that a pattern matches; what it does not name stays as the pass has it."""

    pattern: Annotated[
        str, Meta(min_length=1, description="Layers: a glob (`*.down_proj`) or a `re:` regular expression.")
    ]
    number: Annotated[
        Literal["int", "fp8", "nvfp4", "mxfp4"] | None, Meta(description="What a code stands for in these layers.")
    ] = None
    bits: Annotated[Literal[2, 3, 4, 5, 6, 8] | None, Meta(description="Bits per weight of these layers.")] = None
    group_size: Annotated[
        Annotated[int, Meta(ge=1)] | Literal["channel", "tensor", "block"] | None,
        Meta(description="Weights that share a scale in these layers."),
    ] = None
    symmetric: Annotated[
        bool | None, Meta(description="Whether the zero point is fixed in the middle of the grid in these layers.")
    ] = None
    ignore: Annotated[bool, Meta(description="Leave these layers as they are.")] = False


Overrides = Annotated[
    tuple[Override, ...],
    Meta(
        description="Layers that get another grid than the rest, or none; the first whose pattern fits a layer holds."
    ),
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
        raise UsageError(
            "bad value in the parameters", where=f"{where}\n{describe(error)}", hint=_allowed(error, kind)
        ) from None


def _allowed(error: msgspec.ValidationError, kind: Any) -> str:
    """Return a hint that says what the field at fault may be."""
    field = str(error).partition(" - at `$.")[2].rstrip("`").partition("[")[0]
    fields = msgspec.json.schema(kind)["$defs"][kind.__name__]["properties"]
    schema = fields.get(field, {})
    parts = [schema, *schema.get("anyOf", ())]
    choices = [str(choice) for part in parts for choice in part.get("enum", ())]
    if choices and any(part.get("type") == "integer" for part in parts):
        return f"{field} is a number, or one of {', '.join(choices)}"
    if choices:
        return f"{field} is one of {', '.join(choices)}"
    if "description" in schema:
        return f"{field}: {schema['description']}"
    return f"write a mapping with {', '.join(fields)}"


def in_words(params: Mapping[str, Any]) -> str:
    """Return parameters in a line, `bits 4, symmetric true`; those that are empty are left out."""
    named = {name: value for name, value in params.items() if value not in (None, (), [])}
    return ", ".join(f"{name} {value_in_words(value)}" for name, value in named.items())


def value_in_words(value: Any) -> str:
    """Return the value of a parameter as it stands in a line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(value_in_words(item) for item in cast("list[Any]", value))
    if isinstance(value, dict):
        named = cast("dict[str, Any]", value)
        pairs = (f"{key} {value_in_words(one)}" for key, one in named.items() if one not in (None, False))
        return f"({', '.join(pairs)})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe(error: msgspec.ValidationError) -> str:
    """Return msgspec's message with its path in words: `at bits: Invalid enum value 7`."""
    message, _, path = str(error).partition(" - at `")
    path = path.rstrip("`").removeprefix("$").lstrip(".")
    return f"at {path}: {message}" if path else message
