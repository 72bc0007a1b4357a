"""From a recipe to an artifact: what quantize, export, run and plan share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UsageError, nearest
from ..core.processes import is_main
from ..core.recipe import Recipe, Step

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .render import Screen

DEFAULT_EXPORT = "safetensors"


def exports(written: Iterable[str]) -> tuple[Step, ...]:
    """Read `--export NAME[:KEY=VALUE,...]`.

    Raises:
        UsageError: an unknown exporter or parameter, a bad value.
    """
    from ..exporters import EXPORTERS
    from .options import parse_pairs

    steps: list[Step] = []
    for text in written:
        name, colon, pairs = text.partition(":")
        exporter = EXPORTERS.load(name, where=f"--export {text}")
        params = parse_pairs(pairs, exporter.Params, where=f"--export {name}") if colon else {}
        steps.append(Step(name, params))
    return tuple(steps)


def execute(
    recipe: Recipe,
    output: Path | None,
    screen: Screen,
    *,
    dry_run: bool = False,
    save_recipe: Path | None = None,
    force: bool = False,
    max_memory: str | None = None,
    inputs: Iterable[Path] = (),
    notes: Iterable[str] = (),
) -> None:
    """Check a recipe, and unless it is a dry run, carry it out and show what was made.

    `inputs` are further files that are read and so must not lie in the output. `notes` are said once the recipe is
    known to work.

    Raises:
        UsageError: the recipe cannot work, or no output was named.
    """
    from ..pipeline.output import check_output, inputs_of
    from ..pipeline.plan import make_plan
    from ..pipeline.recipe import dump_recipe
    from .views import manifest_sections, plan_sections

    if output is None and not dry_run:
        raise UsageError("no output folder given", hint="name one with -o DIR, or use --dry-run to see the plan")
    plan = make_plan(recipe, max_memory=None if max_memory is None else parse_size(max_memory))
    if output is not None:
        check_output(output, force=force or dry_run, inputs=[*inputs_of(recipe), *inputs])
    for note in notes:
        screen.reporter.note(note)
    if save_recipe is not None:
        dump_recipe(recipe, save_recipe)
        screen.reporter.note(f"recipe written to {save_recipe}")
    if output is None or dry_run:
        screen.show(plan_sections(plan), plan.to_dict())
        return
    from ..pipeline.run import run_plan

    manifest = run_plan(plan, output, force=force, reporter=screen.reporter)
    if not is_main():
        return
    import msgspec

    document = {"directory": str(output), **msgspec.to_builtins(manifest)}
    screen.show(manifest_sections(manifest, output, source_bytes=plan.facts.bytes), document, summary=True)


def default_output(recipe: Path) -> Path:
    """Return the folder that `llmopt run` writes when none is named: the recipe's name, in the current folder.

    Raises:
        UsageError: the recipe's name has no ending to take off.
    """
    folder = Path(recipe.stem)
    if folder.name == recipe.name:
        raise UsageError(f"no output folder given for {recipe}", hint="name one with -o DIR")
    return folder


def parse_size(text: str) -> int:
    """Return a number of bytes written as `2GiB`, `800 MB` or `1.5G` (binary, as is a unit without B).

    Raises:
        UsageError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise UsageError(f"`{text}` is no amount of memory", hint="write it as 2GiB or 800MiB")
    base = 1000 if (found[3] or "").upper() == "B" else 1024
    return int(float(found[1]) * base ** ("KMGT".index(found[2].upper()) + 1))


@dataclass(frozen=True, slots=True)
class Scheme:
    """What `--scheme` stands for.

    Attributes:
        weights: parameters of the pass that quantizes weights.
        inputs: parameters of `quantize-activations`; None when activations stay in floating point.
    """

    weights: dict[str, Any]
    inputs: dict[str, Any] | None = None


def schemes() -> dict[str, Scheme]:
    """Return all schemes by name."""
    from ..core.quantized import BITS

    integers = {f"w{bits}a16": Scheme({"bits": bits}) for bits in BITS}
    return integers | {
        "w8a8-int8": Scheme({"bits": 8, "group_size": "channel"}, {"number": "int8"}),
        "w8a8-fp8": Scheme({"number": "fp8"}, {"number": "fp8"}),
        "w4a8": Scheme({"bits": 4}, {"number": "int8"}),
        "w4a8-fp8": Scheme({"bits": 4}, {"number": "fp8"}),
        "fp8": Scheme({"number": "fp8"}),
        "nvfp4": Scheme({"number": "nvfp4"}),
        "mxfp4": Scheme({"number": "mxfp4"}),
    }


def parse_scheme(scheme: str) -> Scheme:
    """Return what a scheme such as `w4a16` stands for.

    Raises:
        UsageError: an unknown scheme; the hint names the known.
    """
    known = schemes()
    if scheme not in known:
        hint = nearest(scheme, known)
        raise UsageError(
            f"unknown scheme `{scheme}`",
            where="a scheme is w<bits of a weight>a<bits of an activation>, 16 being floating point, or a format",
            hint=hint if hint.startswith("did you mean") else f"known: {', '.join(known)}",
        )
    return known[scheme]
