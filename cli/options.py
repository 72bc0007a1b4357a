"""Parameter structs become command-line options, so that a parameter is declared once.

A command writes its own options as ordinary typer parameters and adds the generated ones with a decorator:

    @with_options(Source("gptq", GptqParams), Source("rtn", RtnParams))
    def command(model: str, *, options: Options) -> None: ...

`options` then holds what was given on the command line, checked against the annotation of its field.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import typer

from ..core.errors import UsageError, nearest
from ..core.params import describe
from .parameters import Parameter, parameters, value_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

R = TypeVar("R")

Options = dict[str, dict[str, Any]]
"""By the name of a source: the parameters that were given, as plain data."""

_FLAG_NAMES = {"symmetric": "--symmetric/--asymmetric"}
"""Flags whose opposite has a name of its own."""


@dataclass(frozen=True, slots=True)
class Source:
    """A struct whose fields become options.

    Attributes:
        name: under which its values reach the command, such as `gptq`.
        struct: the parameters.
        leave_out: fields that are set in another way.
        panel: the heading of its options in the help.
        always: whether its options always apply; otherwise the help names the sources that know an option.
    """

    name: str
    struct: type[msgspec.Struct]
    leave_out: frozenset[str] = frozenset()
    panel: str | None = None
    always: bool = True

    def parameters(self) -> dict[str, Parameter]:
        """Return the fields that become options, by name."""
        return {item.name: item for item in parameters(self.struct) if item.name not in self.leave_out}


def with_options(*sources: Source) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Add the options of `sources` to a command; the values reach it as its argument `options`."""
    known: dict[str, dict[str, Parameter]] = {}
    panels: dict[str, str | None] = {}
    alternatives = [source for source in sources if not source.always]
    for source in sources:
        for name, parameter in source.parameters().items():
            known.setdefault(name, {})[source.name] = parameter
            panels.setdefault(name, source.panel)

    def decorate(command: Callable[..., R]) -> Callable[..., R]:
        @wraps(command)
        def wrapper(**values: Any) -> R:
            given: Options = {source.name: {} for source in sources}
            for name, owners in known.items():
                raw = values.pop(name)
                if raw is None or raw == []:
                    continue
                for owner, parameter in owners.items():
                    given[owner][name] = parse(raw, parameter)
            return command(**values, options=given)

        own = inspect.signature(command, eval_str=True)
        rest = [item for item in own.parameters.values() if item.name != "options"]
        generated = [_keyword(name, owners, alternatives, panels[name]) for name, owners in known.items()]
        rest = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in rest]
        wrapper.__signature__ = own.replace(parameters=[*rest, *generated])  # pyright: ignore[reportAttributeAccessIssue]
        wrapper.__annotations__ = {item.name: item.annotation for item in [*rest, *generated]}
        del wrapper.__wrapped__  # typer would look through it, at the signature without the generated options
        return wrapper

    return decorate


def refuse_foreign(options: Options, chosen: str, alternatives: Iterable[str], *, kind: str) -> None:
    """Refuse options that only other alternatives than the chosen one know.

    Args:
        options: what was given, by source.
        chosen: the source that was chosen.
        alternatives: all sources of that kind.
        kind: the option that chooses, such as `--method`.

    Raises:
        UsageError: it names those that do know the option.
    """
    for other in alternatives:
        for name in options[other]:
            if name in options[chosen]:
                continue
            knowing = [item for item in alternatives if name in options[item]]
            raise UsageError(
                f"--{name.replace('_', '-')} does not apply to {kind} {chosen}",
                hint=f"it belongs to {' or '.join(f'{kind} {item}' for item in knowing)}",
            )


def parse(raw: Any, parameter: Parameter) -> Any:
    """Turn what stood on the command line into the plain value that a recipe would hold.

    Raises:
        UsageError: a wrong type or a value out of range.
    """
    option = f"--{parameter.flag}"
    if parameter.item is not None:
        return [parse_struct(text, parameter.item, where=option) for text in raw]
    return parse_value(raw, parameter, option=option)


def parse_value(raw: Any, parameter: Parameter, *, option: str, where: str | None = None) -> Any:
    """Like `parse`, for a parameter that is written in another way than as an option."""
    try:
        value = msgspec.convert(raw, parameter.hint, strict=False)
    except msgspec.ValidationError as error:
        shown = value_text(raw)
        details = "\n".join(line for line in (where, _expected(error, parameter)) if line)
        hint = _hint(shown, parameter, option)
        raise UsageError(f"bad value for {option}: {shown}", where=details, hint=hint) from None
    return list(value) if isinstance(value, tuple) else msgspec.to_builtins(value)


def _expected(error: msgspec.ValidationError, parameter: Parameter) -> str:
    words = parameter.words.replace("`", "")
    return f"expected {words}" if words != "value" else describe(error)


def _hint(shown: str, parameter: Parameter, option: str) -> str:
    choices = [item for item in parameter.metavar.split("|") if item not in {"N", "X", "TEXT", "VALUE"}]
    hint = nearest(shown, choices) if len(choices) > 1 else ""
    if hint.startswith("did you mean"):
        return hint
    join = " " if option.startswith("--") else "="
    if parameter.default_text:
        return f"for example {option}{join}{parameter.default_text}"
    return f"{option} takes {parameter.metavar}"


def parse_struct(text: str, struct: type[msgspec.Struct], *, where: str) -> dict[str, Any]:
    """Read `FIRST:key=value,key=value`: the struct's first field, then others; the first may itself hold colons.

    Raises:
        UsageError: no pair, an unknown key, a bad value.
    """
    name = struct.__struct_encode_fields__[0]
    first, _, pairs = text.rpartition(":")
    if not first:
        example = f"{where} '{name.upper()}:KEY=VALUE'"
        raise UsageError(f"cannot read `{text}`", where=where, hint=f"write {example}")
    return {name: first, **parse_pairs(pairs, struct, where=f"{where} {text}")}


def parse_pairs(text: str, struct: type[msgspec.Struct], *, where: str) -> dict[str, Any]:
    """Read `key=value,key=value` against a struct; a key that is a list may be given several times.

    Args:
        text: the pairs.
        struct: the parameters that are known.
        where: what they belong to, such as `--export onnx`.

    Raises:
        UsageError: no pair, an unknown key, a bad value.
    """
    known = {item.name: item for item in parameters(struct)}
    values: dict[str, Any] = {}
    for pair in text.split(","):
        key, equals, raw = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise UsageError(f"cannot read `{pair}` as a parameter", where=where, hint="write NAME:key=value,key=value")
        if key not in known:
            hint = nearest(key, known) if known else "it takes none"
            raise UsageError(f"unknown parameter `{key}`", where=where, hint=hint)
        parameter = known[key]
        given = [raw] if parameter.is_list else raw
        value = parse_value(given, parameter, option=key, where=where)
        values[key] = [*values.get(key, []), *value] if parameter.is_list else value
    return values


def _keyword(
    name: str, owners: Mapping[str, Parameter], alternatives: list[Source], panel: str | None
) -> inspect.Parameter:
    parameter = next(iter(owners.values()))
    partial = bool(alternatives) and set(owners) < {source.name for source in alternatives}
    only = f"Only for {' and '.join(owners)}. " if partial else ""
    details = "; ".join(text for text in (_range(parameter), _default(owners)) if text)
    help_text = f"{only}{parameter.description}" + (f" [{details}]" if details else "")
    option = typer.Option(
        None,
        _declaration(owners),
        help=help_text,
        metavar=None if parameter.is_flag else parameter.metavar,
        rich_help_panel=panel,
        show_default=False,
    )
    annotation: Any = bool | None if parameter.is_flag else list[str] | None if parameter.is_list else str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


def _declaration(owners: Mapping[str, Parameter]) -> str:
    """Return the option's name; a flag that is off unless it is given needs no opposite."""
    parameter = next(iter(owners.values()))
    if not parameter.is_flag:
        return f"--{parameter.flag}"
    if parameter.name in _FLAG_NAMES:
        return _FLAG_NAMES[parameter.name]
    off = all(item.default is False for item in owners.values())
    return f"--{parameter.flag}" if off else f"--{parameter.flag}/--no-{parameter.flag}"


def _range(parameter: Parameter) -> str:
    """Return limits of a number; choices already stand in the metavar."""
    return "" if parameter.is_list else ", ".join(parameter.words.replace("`", "").split(" or ")[0].split(", ")[1:])


def _default(owners: Mapping[str, Parameter]) -> str:
    texts = {owner: _default_text(parameter) for owner, parameter in owners.items()}
    if all(parameter.is_flag and parameter.default is False for parameter in owners.values()):
        return ""
    if len(set(texts.values())) == 1:
        text = next(iter(texts.values()))
        return f"default: {text}" if text else ""
    return "default: " + ", ".join(f"{text or 'none'} ({owner})" for owner, text in texts.items())


def _default_text(parameter: Parameter) -> str:
    if not parameter.is_flag or parameter.required:
        return parameter.default_text
    positive, _, negative = _FLAG_NAMES.get(parameter.name, "yes/no").partition("/")
    return (positive if parameter.default else negative).lstrip("-")
