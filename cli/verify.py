"""`llmopt verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Artifact, Json, Quiet, Verbose, open_screen


def command(
    directory: Artifact,
    *,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="Run the recipe in llmopt.json again, in a temporary folder, and compare every byte too. Paths in it "
            "are those of the folder it was run in.",
        ),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check an artifact again: its files, its weights, its outputs.

    Exit 3 when a file is not what llmopt.json says, or when the artifact no longer computes what the model computes.
    """
    import msgspec

    from ..pipeline.verify import verify
    from .views import export_sections

    screen = open_screen(json=json, quiet=quiet, verbose=verbose)
    records = verify(directory, reporter=screen.reporter)
    document = {"directory": str(directory), "exports": msgspec.to_builtins(records)}
    if rebuild:
        from ..pipeline.rebuild import rebuild as build_again

        document["rebuilt_files"] = files = build_again(directory, reporter=screen.reporter)
        screen.reporter.note(f"built again: {files} files, equal byte for byte")
    screen.show(export_sections(records, directory), document, summary=True)
