"""`llmopt eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import UsageError
from ..core.quantities import parse_share
from .common import Json, ModelOrArtifact, Quiet, Verbose, open_screen, parse_columns


def command(
    path: ModelOrArtifact,
    *,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="A .txt, .jsonl, .csv or .parquet file, or hf:NAME[/CONFIG][:SPLIT]. Required, but for lm-eval:NAME, "
            "where it may name a folder with tasks.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="perplexity, multiple-choice, generate, transcribe, classify, similarity, retrieval, or lm-eval:NAME "
            "for a task of lm-evaluation-harness. [default: what fits the model and the columns]",
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[ROLE=]NAME",
            help="The column that holds the text, or plays a role in a task: answer=gold, choices=A+B+C+D. Columns "
            "with the usual names are found. Give it several times for several roles.",
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="Tokens of a window. [default: 512, or what the context has room for]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Samples to use. [default: all]")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Tokens to generate for an answer. [default: the longest answer's, and 8]"
        ),
    ] = None,
    confidence: Annotated[
        str, typer.Option(metavar="SHARE", help="Confidence of the intervals. [default: 95%]")
    ] = "95%",
    samples: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what was found of each sample, as JSONL.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure how good a model or an artifact is at a task.

    Without --task the columns of the data tell which: a question, choices and an answer are multiple choice, a prompt
    and an answer are generated and matched exactly, a text and a label are classified, two sentences and a score are
    compared by their embeddings, a query and a document are retrieved; running text gives the perplexity, over windows
    that do not overlap, each begun with the BOS token where the tokenizer has one. An artifact of llmopt is also
    compared with its source, on the same samples, when that is at hand. Intervals come from a bootstrap over samples.

        llmopt eval my-llama-int4 --data questions.jsonl --samples answers.jsonl
    """
    from ..pipeline.measuring.asking import EvalOptions
    from ..pipeline.measuring.evaluate import evaluate
    from ..pipeline.measuring.tasks import TaskOptions
    from .views import evaluation_sections

    if data is None and not (task or "").startswith("lm-eval:"):
        raise UsageError("missing --data", hint="`llmopt eval --help` shows how to call it")
    screen = open_screen(json=json, quiet=quiet, verbose=verbose)
    options = EvalOptions(
        data=data,
        task=task,
        columns=parse_columns(column or (), "--column"),
        samples=TaskOptions(length, limit, max_new_tokens),
        confidence=parse_share(confidence, where="--confidence"),
        write=samples,
    )
    report = evaluate(path, data=data, options=options, reporter=screen.reporter)
    screen.show(evaluation_sections(report), report)
