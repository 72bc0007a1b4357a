"""`llmopt export`."""

from __future__ import annotations

from ..core.recipe import ModelSpec, Recipe, Step
from ..passes import PASSES
from .build import DEFAULT_EXPORT, execute, exports
from .common import (
    DryRun,
    Export,
    Force,
    Json,
    MaxMemory,
    ModelArgument,
    Output,
    Quiet,
    SaveRecipe,
    Seed,
    Verbose,
    open_screen,
)
from .options import Options, Source, with_options


@with_options(
    Source("cast", PASSES.load("cast").Params, panel="Model"),
    Source("model", ModelSpec, frozenset({"id"}), "Model"),
)
def command(
    model: ModelArgument,
    *,
    output: Output = None,
    export: Export = None,
    seed: Seed = 0,
    dry_run: DryRun = False,
    save_recipe: SaveRecipe = None,
    force: Force = False,
    max_memory: MaxMemory = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: Options,
) -> None:
    """Export a model without changing its weights.

    Each artifact is opened again in the runtime it is for and compared with the model. With --dtype the weights are
    first rounded to that type.

        llmopt export ./my-bert -o my-bert-onnx --export onnx
    """
    screen = open_screen(json=json, quiet=quiet, verbose=verbose)
    recipe = Recipe(
        model=ModelSpec(id=model, **options["model"]),
        passes=(Step("cast", options["cast"]),) if options["cast"] else (),
        exports=exports(export or [DEFAULT_EXPORT]),
        seed=seed,
    )
    execute(recipe, output, screen, dry_run=dry_run, save_recipe=save_recipe, force=force, max_memory=max_memory)
