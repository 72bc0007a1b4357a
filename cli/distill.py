"""`llmopt distill`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..core.errors import UsageError
from ..core.params import convert
from ..core.passes import Need, Pass
from ..core.recipe import ModelSpec, Recipe, Step
from ..passes import PASSES
from .building import Build, building, execute
from .common import ModelArgument
from .options import Options, Source, with_options


@with_options(
    Source("distill", PASSES.load("distill").Params, panel="Learning"),
    Source("model", ModelSpec, frozenset({"id"}), "Model"),
)
@building()
def command(
    model: ModelArgument,
    *,
    student: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model that learns, in the place of MODEL, which is its teacher then.",
            rich_help_panel="Learning",
        ),
    ] = None,
    build: Build,
    options: Options,
) -> None:
    """Let a model learn from a teacher and export it.

    MODEL is the student, a folder whose model is smaller than the teacher or has lost something; with `--student`
    MODEL is the teacher. With `--lm 1` or `--labels 1` alone it learns from the data and needs no teacher. `accelerate
    launch --multi_gpu -m llmopt distill …` trains on several processes.

        llmopt distill ./pruned -o ./recovered --teacher ./original --data wiki.txt --steps 2000
        llmopt distill ./original -o ./recovered --student ./pruned --data wiki.txt --steps 2000
    """
    screen = build.screen()
    given = options["distill"]
    if student is not None:
        model, given = student, {**given, "teacher": _teacher_of(model, student, given)}
    if "data" not in given:
        raise UsageError("distill needs text", hint="name it with --data SPEC")
    if "teacher" not in given and Need.TEACHER in _built(given).requires():
        raise UsageError(
            "distill needs a teacher", hint="name it with --teacher MODEL, or learn from the text alone with --lm 1"
        )
    recipe = Recipe(
        model=ModelSpec(id=model, **options["model"]),
        passes=(Step("distill", given),),
        exports=build.exports(),
        seed=build.seed,
        threads=build.threads,
    )
    execute(recipe, build, screen)


def _teacher_of(model: str, student: str, given: dict[str, Any]) -> str:
    """Return the teacher's name where the student has one of its own."""
    if "teacher" in given:
        raise UsageError(
            "two teachers are named",
            where=f"MODEL {model}, beside the student {student}, and --teacher {given['teacher']}",
            hint="leave one of them out",
        )
    return model


def _built(given: dict[str, Any]) -> Pass[Any]:
    """Return the pass with the parameters that were given."""
    kind = PASSES.load("distill")
    return kind(convert(given, kind.Params, where="distill"))
