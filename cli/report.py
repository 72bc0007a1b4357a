"""`llmopt report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Json, Quiet, Verbose, open_screen


def command(
    directories: Annotated[list[str], typer.Argument(metavar="DIR...", help="Artifacts: folders with llmopt.json.")],
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The page to write, .html, or the model card of one artifact, .md; replaced if it exists.",
        ),
    ] = None,
    evals: Annotated[
        list[Path] | None,
        typer.Option("--eval", metavar="FILE", help="What `llmopt eval --json` printed; may be given several times."),
    ] = None,
    benches: Annotated[
        list[Path] | None,
        typer.Option("--bench", metavar="FILE", help="What `llmopt bench --json` printed; may be given several times."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write what is known of artifacts as a page or a model card.

    What was done pass by pass, time and memory, size by part before and after, quality with its intervals, the error of
    every layer, speed by engine, and how to load it. The page is one file that asks for nothing from elsewhere; every
    number in it is in the document that `--json` prints.

        llmopt report my-llama-int4 -o report.html
        llmopt report int4 int8 --eval int4.json --eval int8.json -o both.html
    """
    from ..core.errors import UsageError
    from ..pipeline.report import make_report, write_report
    from .views import written_sections

    if output is None and not json:
        hint = "name a page with -o report.html, or print the document with --json"
        raise UsageError("no file to write given", hint=hint)
    screen = open_screen(json=json, quiet=quiet, verbose=verbose)
    report = make_report(directories, evals=evals or [], benches=benches or [])
    if output is not None:
        write_report(report, output)
    screen.show([] if output is None else written_sections(report, output), report, summary=True)
