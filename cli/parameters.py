"""What a parameter struct declares, as data: read by the generator of options and by the generated documentation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_type_hints

import msgspec
from msgspec import inspect

_METAVAR_OF_LIST = "PATTERN"
_METAVARS: dict[type[inspect.Type], str] = {
    inspect.IntType: "N",
    inspect.FloatType: "X",
    inspect.StrType: "TEXT",
    inspect.BoolType: "true|false",
}
_WORDS: dict[type[inspect.Type], str] = {
    inspect.IntType: "integer",
    inspect.FloatType: "number",
    inspect.StrType: "text",
    inspect.BoolType: "true or false",
    inspect.DictType: "mapping",
    inspect.AnyType: "anything",
}
_LIMITS = (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most"))


@dataclass(frozen=True, slots=True)
class Parameter:
    """A field of a parameter struct.

    Attributes:
        name: the field's name.
        hint: its annotation, which `msgspec.convert` checks values against.
        words: type and range in words, such as "integer, at least 1".
        metavar: the value as a usage line shows it, such as `N|channel|tensor`.
        is_flag: whether it is true or false.
        is_list: whether it holds several values.
        item: the struct that each of its values is, None when they are plain.
        required: whether it has no default.
        default: its default, None when required.
        description: its help text, one or several sentences.
    """

    name: str
    hint: Any
    words: str
    metavar: str
    is_flag: bool
    is_list: bool
    item: type[msgspec.Struct] | None
    required: bool
    default: Any
    description: str

    @property
    def flag(self) -> str:
        """The name of its option, without the dashes; one occurrence of a list of structs is one of them."""
        name = self.name if self.item is None else self.name.removesuffix("s")
        return name.replace("_", "-")

    @property
    def default_text(self) -> str:
        """The default as people write it, "" when there is none."""
        return "" if self.required else value_text(self.default)


def value_text(value: Any) -> str:
    """Return a parameter's value as people write it; "" for what is empty."""
    if value is None or value in ((), {}):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, msgspec.Struct):
        value = msgspec.to_builtins(value)
    if isinstance(value, dict):
        pairs = [f"{key}={value_text(item)}" for key, item in list(value.items())[1:] if value_text(item)]
        return f"{next(iter(value.values()))}:{','.join(pairs)}"
    if isinstance(value, (tuple, list)):
        return ", ".join(value_text(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


@lru_cache
def parameters(struct: type[msgspec.Struct]) -> tuple[Parameter, ...]:
    """Return what `struct` declares, in its order."""
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    hints = get_type_hints(struct, include_extras=True)
    return tuple(_parameter(field, hints[field.name]) for field in info.fields)


def _parameter(field: inspect.Field, hint: Any) -> Parameter:
    kind, description = field.type, ""
    if isinstance(kind, inspect.Metadata):
        description = (kind.extra_json_schema or {}).get("description", "")
        kind = kind.type
    default = field.default
    if default is msgspec.NODEFAULT:
        default = None if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    return Parameter(
        name=field.encode_name,
        hint=hint,
        words=_words(kind),
        metavar=_metavar(kind),
        is_flag=isinstance(kind, inspect.BoolType),
        is_list=isinstance(kind, (inspect.VarTupleType, inspect.ListType)),
        item=_item(kind),
        required=field.required,
        default=default,
        description=description,
    )


def _item(kind: inspect.Type) -> type[msgspec.Struct] | None:
    held = kind.item_type if isinstance(kind, (inspect.VarTupleType, inspect.ListType)) else None
    return held.cls if isinstance(held, inspect.StructType) else None


def _metavar(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.Metadata):
        return _metavar(kind.type)
    if isinstance(kind, (inspect.VarTupleType, inspect.ListType)):
        item = _item(kind)
        first = "" if item is None else item.__struct_encode_fields__[0].upper()
        if first:
            return f"{first}:KEY=VALUE,..."
        held = _metavar(kind.item_type)
        return _METAVAR_OF_LIST if held == _METAVARS[inspect.StrType] else held
    if isinstance(kind, inspect.UnionType):
        return "|".join(_metavar(item) for item in kind.types if not isinstance(item, inspect.NoneType))
    return "|".join(_choices(kind)) or _METAVARS.get(type(kind), "VALUE")


def _words(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.Metadata):
        return _words(kind.type)
    if isinstance(kind, (inspect.VarTupleType, inspect.ListType)):
        item = _item(kind)
        fields = "" if item is None else ", ".join(f"`{name}`" for name in item.__struct_encode_fields__)
        return f"list of mappings with {fields}" if fields else f"list of {_words(kind.item_type)}"
    if isinstance(kind, inspect.DictType):
        return f"mapping of names to {_words(kind.value_type)}"
    if isinstance(kind, inspect.UnionType):
        # None is what stands when nothing is given; nobody writes it.
        return " or ".join(_words(item) for item in kind.types if not isinstance(item, inspect.NoneType))
    choices = _choices(kind)
    if choices:
        return " or ".join(f"`{choice}`" for choice in choices)
    limits = [f"{text} {value:g}" for name, text in _LIMITS if (value := getattr(kind, name, None)) is not None]
    return ", ".join([_WORDS.get(type(kind), "value"), *limits])


def _choices(kind: inspect.Type) -> list[str]:
    if isinstance(kind, inspect.LiteralType):
        return [str(value) for value in kind.values]
    if isinstance(kind, inspect.EnumType):
        return [str(member.value) for member in kind.cls]
    return []
