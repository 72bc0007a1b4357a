"""`llmopt schema`."""

from __future__ import annotations


def command() -> None:
    """Print the JSON Schema of recipes.

    Editors check and complete a recipe with it: `llmopt schema > recipe.schema.json`, then
    `# yaml-language-server: $schema=recipe.schema.json` in the first line of the recipe.
    """
    from ..pipeline.recipe import recipe_schema
    from .render import Screen

    Screen(json=True).show([], recipe_schema())
