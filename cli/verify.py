"""`llmopt verify`."""

from __future__ import annotations

from .common import Artifact, Json, Quiet, Verbose, open_screen


def command(
    directory: Artifact,
    *,
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
    screen.show(export_sections(records, directory), document, summary=True)
