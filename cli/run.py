"""`llmopt run`."""

from __future__ import annotations

from dataclasses import replace

from .building import Build, building, default_output, execute
from .common import RecipeFile


@building("export", "seed", "threads", "save_recipe")
def command(
    recipe: RecipeFile,
    *,
    build: Build,
) -> None:
    """Run a recipe.

    Without -o the output folder is called like the recipe, without its ending, in the current folder.

        llmopt run int4.yaml -o my-llama-int4
    """
    from ..pipeline.recipe import load_recipe

    screen = build.screen()
    loaded = load_recipe(recipe)
    if build.output is None and not build.dry_run:
        build = replace(build, output=default_output(recipe))
    execute(loaded, build, screen, written_in=recipe)
