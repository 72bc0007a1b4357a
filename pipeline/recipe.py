"""Reading, checking and writing recipes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec

from ..core.errors import UsageError, nearest
from ..core.params import convert
from ..core.recipe import CalibrationSpec, EvaluationSpec, ModelSpec, Recipe, Step
from ..core.threads import DEFAULT
from ..evaluation.gates import gates_of
from ..evaluation.metrics import METRICS

_KEYS = ("model", "calibration", "passes", "exports", "gates", "evaluation", "seed", "threads")
_MAX_BYTES = 256 << 10
_MAX_NODES = 20_000
_MAX_DEPTH = 32
_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null", "merge")
)
_INT = "tag:yaml.org,2002:int"
_MAX_DIGITS = 40
"""Of a whole number; Python does not even show one of thousands."""
_WRITE_ONE = "give a recipe in YAML; `llmopt quantize ... --save-recipe FILE` writes one"


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from YAML (or JSON, which is YAML).

    Raises:
        UsageError: the file is missing or does not hold a recipe.
    """
    import yaml

    try:
        text = _text(path)
    except FileNotFoundError:
        near = [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UsageError(f"no recipe at `{path}`", hint=nearest(path.name, near) if near else _WRITE_ONE) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"`{path}` is not UTF-8", where=f"byte {error.start}", hint=_WRITE_ONE) from None
    except OSError as error:
        raise UsageError(f"cannot read the recipe `{path}`", where=error.strerror, hint=_WRITE_ONE) from None
    try:
        loader = _loader(text)
        root = loader.get_single_node()
        _Nodes(str(path)).count(root, 0)
        _refuse_repeated(root, str(path))
        raw = None if root is None else loader.construct_document(root)
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:
        where = str(error).replace('"<unicode string>"', "the recipe")
        raise UsageError(f"`{path}` is not valid YAML", where=where[:2000], hint="mend the recipe there") from None
    return parse_recipe(raw, where=str(path))


def _loader(text: str) -> Any:
    """Return a safe loader of YAML that refuses brackets within brackets: each costs it as much as there are around."""
    import yaml

    loader: Any = yaml.SafeLoader(text)
    begin = loader.fetch_flow_collection_start

    def begin_shallow(token: Any) -> None:
        if loader.flow_level >= _MAX_DEPTH:
            problem = f"brackets are nested more than {_MAX_DEPTH} levels deep"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=loader.get_mark())
        begin(token)

    loader.fetch_flow_collection_start = begin_shallow
    return loader


def _text(path: Path) -> str:
    """Return what a recipe's file holds, unless it is far larger than one."""
    with path.open("rb") as stream:
        raw = stream.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise UsageError(f"`{path}` is no recipe", where=f"it has more than {_MAX_BYTES} bytes", hint=_WRITE_ONE)
    return raw.decode("utf-8")


class _Nodes:
    """Counts the values of a YAML document as it would be written without aliases.

    An alias costs nothing to read, but everything that walks through the recipe meets what it stands for each time: ten
    lines of ten aliases each stand for 10^10 values.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._known: dict[int, int] = {}

    def count(self, node: Any, depth: int) -> int:
        """Return how many values `node` stands for.

        Raises:
            UsageError: too many, nested too deeply, a ring of aliases, or of a kind that no parameter has.
        """
        if node is None:
            return 0
        if id(node) in self._known and self._known[id(node)]:
            return self._known[id(node)]
        if id(node) in self._known:
            raise self._refused(node, "holds itself")
        if depth > _MAX_DEPTH:
            raise self._refused(node, f"is nested more than {_MAX_DEPTH} levels deep")
        if node.tag not in _TAGS:
            raise self._refused(node, f"is a `{node.tag.rpartition(':')[2]}`, which no parameter is")
        if node.tag == _INT and len(node.value) > _MAX_DIGITS:
            raise self._refused(node, f"is a number of more than {_MAX_DIGITS} digits")
        if isinstance(node.value, str) and not all(each.isprintable() or each in "\t\n" for each in node.value):
            raise self._refused(node, "holds a character that cannot be shown")
        self._known[id(node)] = 0
        total = 1 + sum(self.count(part, depth + 1) for part in _parts(node))
        if total > _MAX_NODES:
            raise self._refused(node, f"stands for more than {_MAX_NODES} values")
        self._known[id(node)] = total
        return total

    def _refused(self, node: Any, why: str) -> UsageError:
        line = node.start_mark.line + 1
        hint = "write a recipe as `llmopt schema` describes it; text goes into quotes"
        return UsageError(f"a value in the recipe {why}", where=f"{self._where}, line {line}", hint=hint)


def _parts(node: Any) -> Iterator[Any]:
    """Yield the nodes in a node: a list's, or a mapping's keys and values."""
    value: Any = node.value
    for item in cast("list[Any]", value) if isinstance(value, list) else ():
        yield from cast("tuple[Any, ...]", item) if isinstance(item, tuple) else (item,)


def _refuse_repeated(node: Any, where: str) -> None:
    """Refuse a key that stands twice in one mapping: YAML takes the last, and leaves the others out without a word."""
    if isinstance(getattr(node, "value", None), list):
        seen: set[str] = set()
        for item in node.value:
            pair = cast("tuple[Any, ...]", item if isinstance(item, tuple) else (item,))
            key = str(pair[0].value) if len(pair) == 2 else None
            if key is not None and key in seen:
                line = pair[0].start_mark.line + 1
                raise UsageError(f"`{key}` stands twice in the recipe", where=f"{where}, line {line}", hint="keep one")
            seen.update(() if key is None else (key,))
            for child in pair:
                _refuse_repeated(child, where)


def parse_recipe(raw: Any, *, where: str) -> Recipe:
    """Build a recipe from plain data.

    Args:
        raw: what a YAML file or a manifest holds.
        where: the file, for messages.

    Raises:
        UsageError: it is no recipe; the parameters of passes and exports are not looked at here.
    """
    if not isinstance(raw, dict):
        raise UsageError("a recipe is a mapping", where=where, hint=f"its keys are {', '.join(_KEYS)}")
    data = cast("dict[str, Any]", raw)
    for key in data:
        if key not in _KEYS:
            raise UsageError(f"unknown key `{key}` in the recipe", where=where, hint=nearest(str(key), _KEYS))
    if "model" not in data:
        raise UsageError("the recipe names no model", where=where, hint="add a line `model: PATH`")
    model = data["model"]
    calibration = data.get("calibration")
    seed = data.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UsageError("seed must be a whole number, at least 0", where=where, hint="write for example `seed: 1`")
    threads = data.get("threads")
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise UsageError(
            "threads must be a whole number, at least 1", where=where, hint="write for example `threads: 8`"
        )
    return Recipe(
        model=convert({"id": model} if isinstance(model, str) else model, ModelSpec, where=f"{where}, model"),
        calibration=None
        if calibration is None
        else convert(calibration, CalibrationSpec, where=f"{where}, calibration"),
        passes=_steps(data.get("passes"), where=f"{where}, passes"),
        exports=_steps(data.get("exports"), where=f"{where}, exports"),
        gates=gates_of(data.get("gates"), where=f"{where}, gates"),
        evaluation=_evaluations(data.get("evaluation"), where=f"{where}, evaluation"),
        seed=seed,
        threads=threads,
    )


def _evaluations(raw: Any, *, where: str) -> tuple[EvaluationSpec, ...]:
    """Read one evaluation, or a list of them."""
    if raw is None:
        return ()
    if not isinstance(raw, list):
        return (convert(raw, EvaluationSpec, where=where),)
    each = enumerate(cast("list[Any]", raw))
    return tuple(convert(one, EvaluationSpec, where=f"{where}[{index}]") for index, one in each)


def dump_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as YAML."""
    import yaml

    try:
        path.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
    except OSError as error:
        hint = "give the name of a file, in a folder that exists, with --save-recipe"
        raise UsageError(f"cannot write the recipe to `{path}`", where=error.strerror, hint=hint) from None


def _steps(raw: Any, *, where: str) -> tuple[Step, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list):
        raise UsageError("expected a list", where=where, hint="write one `- name: {parameter: value}` a line")
    return tuple(_step(item, where=f"{where}[{index}]") for index, item in enumerate(cast("list[Any]", raw)))


def _step(item: Any, *, where: str) -> Step:
    if isinstance(item, str):
        return Step(item)
    if isinstance(item, dict):
        entry = cast("dict[Any, Any]", item)
        name, params = next(iter(entry.items())) if len(entry) == 1 else (None, None)
        if isinstance(name, str) and (params is None or isinstance(params, dict)):
            return Step(name, cast("dict[str, Any]", params or {}))
    raise UsageError(
        "a step is a name, or one name with its parameters", where=where, hint="for example `- gptq: {bits: 4}`"
    )


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a recipe, made from the parameters' declarations."""
    from ..exporters import EXPORTERS
    from ..passes import PASSES

    kinds: dict[str, dict[str, type[msgspec.Struct]]] = {
        "passes": {name: PASSES.load(name).Params for name in PASSES},
        "exports": {name: EXPORTERS.load(name).Params for name in EXPORTERS},
    }
    parameters = (struct for group in kinds.values() for struct in group.values())
    structs = [ModelSpec, CalibrationSpec, EvaluationSpec, *parameters]
    schemas, definitions = msgspec.json.schema_components(structs, ref_template="#/$defs/{name}")
    reference = dict(zip(structs, schemas, strict=True))

    def steps(group: dict[str, type[msgspec.Struct]]) -> dict[str, Any]:
        named = [
            {
                "type": "object",
                "properties": {name: {"anyOf": [reference[struct], {"type": "null"}]}},
                "required": [name],
                "additionalProperties": False,
            }
            for name, struct in group.items()
        ]
        return {"type": "array", "items": {"anyOf": [{"enum": sorted(group)}, *named]}}

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "llmopt recipe",
        "type": "object",
        "properties": {
            "model": {"anyOf": [{"type": "string"}, reference[ModelSpec]]},
            "calibration": reference[CalibrationSpec],
            **{key: steps(group) for key, group in kinds.items()},
            "gates": _gates_schema(),
            "evaluation": {"anyOf": [reference[EvaluationSpec], {"type": "array", "items": reference[EvaluationSpec]}]},
            "seed": {"type": "integer", "default": 0, "minimum": 0},
            "threads": {"type": "integer", "default": DEFAULT, "minimum": 1},
        },
        "required": ["model"],
        "additionalProperties": False,
        "$defs": definitions,
    }


def _gates_schema() -> dict[str, Any]:
    """Return the schema of gates: a mapping from metrics to limits, or a list of texts such as `size_ratio<=0.35`."""
    limits = {
        name: {"type": ["number", "string"], "description": f"{metric.about} ({metric.comparison} the limit)"}
        for name, metric in METRICS.items()
    }
    names = "|".join(METRICS)
    of_one = {f"^([\\w-]+:)?({names})(@[\\w.-]+)?$": {"type": ["number", "string"]}}
    return {
        "description": "Limits that the artifact must meet; otherwise it stands aside, and the run ends with exit 3.",
        "anyOf": [
            {
                "type": "object",
                "properties": limits,
                "patternProperties": of_one,
                "additionalProperties": False,
            },
            {"type": "array", "items": {"type": "string"}},
        ],
    }
