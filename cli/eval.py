"""`llmopt eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Json, ModelOrArtifact, Quiet, TextSpec, Verbose, open_screen


def command(
    path: ModelOrArtifact,
    *,
    data: TextSpec,
    column: Annotated[str | None, typer.Option(metavar="NAME", help="The column that holds the text.")] = None,
    length: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of a window. [default: 512]")] = 512,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Windows to use. [default: all]")] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure how well a model or an artifact predicts text.

    The perplexity of a causal language model: the text is cut into windows that do not overlap, each begun with the BOS
    token where the tokenizer has one, and the negative log-likelihood of every predicted token is averaged. An artifact
    of llmopt is also compared with its source, when that is at hand: KL divergence and top-1 agreement.
    """
    from ..pipeline.evaluate import evaluate
    from .views import report_sections

    screen = open_screen(json=json, quiet=quiet, verbose=verbose)
    report = evaluate(path, data=data, column=column, length=length, limit=limit, reporter=screen.reporter)
    screen.show(report_sections(report), report)
