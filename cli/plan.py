"""`llmopt plan`."""

from __future__ import annotations

from .building import Build, execute
from .common import Json, RecipeFile, Verbose


def command(
    recipe: RecipeFile,
    *,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what a recipe will do, and refuse what cannot work.

    Shows the steps, what will be left out and why, the estimated peak memory and the size of the output. Reads
    config.json and the headers of the weights, nothing more. A recipe that cannot work is refused with exit 2.
    """
    from ..pipeline.recipe import load_recipe

    build = Build(dry_run=True, json=json, verbose=verbose)
    screen = build.screen()
    execute(load_recipe(recipe), build, screen)
