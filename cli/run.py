"""`llmopt run`."""

from __future__ import annotations

from .build import default_output, execute
from .common import DryRun, Force, Json, MaxMemory, Output, Quiet, RecipeFile, Verbose, open_screen


def command(
    recipe: RecipeFile,
    *,
    output: Output = None,
    dry_run: DryRun = False,
    force: Force = False,
    max_memory: MaxMemory = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run a recipe.

    Without -o the output folder is called like the recipe, without its ending, in the current folder.

        llmopt run int4.yaml -o my-llama-int4
    """
    from ..pipeline.recipe import load_recipe

    screen = open_screen(json=json, quiet=quiet, verbose=verbose)
    loaded = load_recipe(recipe)
    target = output if output is not None or dry_run else default_output(recipe)
    execute(loaded, target, screen, dry_run=dry_run, force=force, max_memory=max_memory, inputs=[recipe])
