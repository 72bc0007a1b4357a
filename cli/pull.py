"""`llmopt pull`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .common import Force, Json, Quiet, Repository, Verbose, open_screen


def command(
    repository: Repository,
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="The folder to write. [default: the repository's name]"),
    ] = None,
    revision: Annotated[str | None, typer.Option(metavar="NAME", help="A branch, a tag or a commit.")] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fetch an artifact from the Hugging Face hub.

    All files are of one commit, and each must be what llmopt.json says; the folder appears when all of them are.

        llmopt pull my-org/my-llama-int4 -o my-llama-int4
    """
    screen = open_screen(json=json, quiet=quiet, verbose=verbose)
    from ..core.numbers import size
    from ..pipeline.publish import pull
    from .render import Pairs

    place = output or Path(repository.rpartition("/")[2])
    made = pull(repository, place, revision=revision, force=force, reporter=screen.reporter)
    shown = [("written", str(place)), ("commit", made.commit), ("files", f"{made.files}, {size(made.bytes)}")]
    screen.show([Pairs("", shown)], {"directory": str(place), **asdict(made)}, summary=True)
