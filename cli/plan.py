"""`llmopt plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import LlmoptError, UsageError
from .building import Build, execute
from .common import Json, RecipeFiles, Verbose, open_screen

if TYPE_CHECKING:
    from .render import Screen


def command(
    recipe: RecipeFiles,
    *,
    check: Annotated[
        bool,
        typer.Option("--check", help="Only check: any number of recipes, and a line for each that cannot work."),
    ] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what a recipe will do, and refuse what cannot work.

    Shows the steps, what will be left out and why, the estimated peak memory and the size of the output. Reads
    config.json and the headers of the weights, nothing more. A recipe that cannot work is refused with exit 2.

    --check is for pre-commit and CI: it takes several recipes, and of one whose model is not on this machine it checks
    the passes, the exports and their parameters.

        llmopt plan --check recipes/*.yaml
    """
    from ..pipeline.recipe import load_recipe

    if check:
        _check(recipe, open_screen(json=json, quiet=False, verbose=verbose))
        return
    if len(recipe) > 1:
        raise UsageError(f"{len(recipe)} recipes, and a plan is of one", hint="check several with --check")
    build = Build(dry_run=True, json=json, verbose=verbose)
    screen = build.screen()
    execute(load_recipe(recipe[0]), build, screen)


def _check(recipes: list[Path], screen: Screen) -> None:
    """Check every recipe, and then refuse those that cannot work, all of them together.

    Raises:
        UsageError: some cannot.
    """
    found = [_checked(recipe) for recipe in recipes]
    bad = [one for one in found if one["error"] is not None]
    if bad:
        where = "\n".join(f"{one['recipe']}: {one['error']}" for one in bad)
        what = f"{len(bad)} of {len(found)} recipes cannot work" if len(found) > 1 else "the recipe cannot work"
        raise UsageError(what, where=where, hint="`llmopt plan RECIPE` says more of each")
    from .render import Lines

    screen.show([Lines("", [f"{one['recipe']}: {one['checked']}" for one in found])], {"recipes": found}, summary=True)


def _checked(path: Path) -> dict[str, Any]:
    """Check one recipe, with its model where that is on this machine."""
    from ..models.locate import looks_like_hub_id
    from ..pipeline.plan import make_plan
    from ..pipeline.recipe import load_recipe
    from ..pipeline.steps import exporters_of, passes_of

    result: dict[str, Any] = {"recipe": str(path), "checked": "it can work", "error": None}
    try:
        recipe = load_recipe(path)
        if Path(recipe.model.id).expanduser().exists() or not looks_like_hub_id(recipe.model.id):
            make_plan(recipe)
        else:
            passes_of(recipe)
            exporters_of(recipe)
            result["checked"] = f"passes, exports and parameters are right; `{recipe.model.id}` is not on this machine"
    except LlmoptError as error:
        result["error"] = "; ".join(line.strip() for line in str(error).removeprefix("error: ").splitlines())
    return result
