"""`llmopt export`."""

from __future__ import annotations

from ..core.recipe import ModelSpec, Recipe, Step
from ..passes import PASSES
from .building import Build, building, execute
from .common import ModelArgument
from .options import Options, Source, with_options


@with_options(
    Source("cast", PASSES.load("cast").Params, panel="Model"),
    Source("model", ModelSpec, frozenset({"id"}), "Model"),
)
@building()
def command(
    model: ModelArgument,
    *,
    build: Build,
    options: Options,
) -> None:
    """Export a model without changing its weights.

    Each artifact is opened again in the runtime it is for and compared with the model. With --dtype the weights are
    first rounded to that type.

        llmopt export ./my-bert -o my-bert-onnx --export onnx
    """
    screen = build.screen()
    recipe = Recipe(
        model=ModelSpec(id=model, **options["model"]),
        passes=(Step("cast", options["cast"]),) if options["cast"] else (),
        exports=build.exports(),
        seed=build.seed,
        threads=build.threads,
    )
    execute(recipe, build, screen)
