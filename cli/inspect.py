"""`llmopt inspect`."""

from __future__ import annotations

from .common import Json, ModelOrArtifact, Verbose, open_screen


def command(
    path: ModelOrArtifact,
    *,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what a model or an artifact is made of.

    Reads config.json, the headers of the weights and llmopt.json, nothing more.
    """
    from ..pipeline.inspect import inspect
    from .views import report_sections

    screen = open_screen(json=json, quiet=False, verbose=verbose)
    report = inspect(path)
    screen.show(report_sections(report), report)
