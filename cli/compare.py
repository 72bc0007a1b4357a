"""`llmopt compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Json, Quiet, Verbose, open_screen


def command(
    first: Annotated[str, typer.Argument(metavar="A", help="An artifact: a folder with llmopt.json.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    *,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show in what two artifacts differ.

    Sizes by part, passes and their parameters, verification, bits and errors of the layers; and, where both have an
    export of one kind, whether the weights that its readers get are equal bit for bit.

        llmopt compare int4 int8
    """
    from ..pipeline.compare import compare_artifacts
    from .views import comparison_sections

    screen = open_screen(json=json, quiet=quiet, verbose=verbose)
    report = compare_artifacts(first, second, reporter=screen.reporter)
    screen.show(comparison_sections(report), report)
