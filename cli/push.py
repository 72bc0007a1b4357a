"""`llmopt push`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from .common import Artifact, Json, Quiet, Repository, Verbose, open_screen


def command(
    directory: Artifact,
    repository: Repository,
    *,
    public: Annotated[
        bool, typer.Option("--public", help="Let everyone read the repository, if it is made now. [default: private]")
    ] = False,
    branch: Annotated[
        str | None, typer.Option(metavar="NAME", help="The branch to write to, made if it is not there.")
    ] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="The message of the commit.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Send an artifact to the Hugging Face hub.

    Every file must be what llmopt.json says, and the verification must have passed. All of it becomes one commit; when
    the connection breaks, the same command goes on with the files that the hub does not have yet.

        llmopt push my-llama-int4 my-org/my-llama-int4
    """
    screen = open_screen(json=json, quiet=quiet, verbose=verbose)
    from ..core.numbers import size
    from ..pipeline.publish import push
    from .render import Pairs

    made = push(directory, repository, public=public, branch=branch, message=message, reporter=screen.reporter)
    shown = [("sent to", made.repository), ("commit", made.commit), ("files", f"{made.files}, {size(made.bytes)}")]
    screen.show([Pairs("", shown)], asdict(made), summary=True)
