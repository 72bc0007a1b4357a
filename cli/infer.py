"""`llmopt infer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.params import convert
from ..pipeline.batching import BatchingParams
from .common import Json, ModelOrArtifact, Quiet, Verbose, open_screen
from .options import Options, Source, with_options


@with_options(Source("batching", BatchingParams, panel="Batches"))
def command(
    path: ModelOrArtifact,
    *,
    input: Annotated[  # noqa: A002  (the name of the option)
        str,
        typer.Option(
            "--input",
            "-i",
            metavar="FILE",
            help="Texts, or rows that name WAV files: a .txt, .jsonl, .csv or .parquet file. Required.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The JSONL file to write. It must not exist.")
    ],
    column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column that holds the text, or the path of the sound.")
    ] = None,
    pair_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column that holds the second text of a pair.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(metavar="N", min=4, help="Tokens kept of a text. [default: as many as the model takes]"),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tokens to generate. [default: 32; of speech, as many as the model has room for]",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads to compute with. [default: all cores]")
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Batches, or sounds, to compute at the same time, each on its share of the threads. [default: one for "
            "each thread, 8 at most]",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE when it exists, once all is done.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: Options,
) -> None:
    """Compute embeddings, classes or text for a file of texts, or write down sounds.

    Writes a line for each text, in order: `index`, and by what the model does `embedding`, or `label`, `score` and
    `scores`, or `tokens`, or `text`. A line of a .txt file is a text, as is a row of the others. Whisper writes the
    `text` of a WAV file for each row: of 16 bits, at the rate that it hears, no longer than it hears at once; paths are
    those from the file's folder. The file appears when it is whole; a run that was interrupted goes on where it was
    when it is started again.

        llmopt infer minilm-onnx --input texts.jsonl -o embeddings.jsonl
        llmopt infer whisper-onnx --input sounds.jsonl -o texts.jsonl
    """
    from ..pipeline.infer import infer
    from ..pipeline.inference import InferOptions
    from .views import report_sections

    screen = open_screen(json=json, quiet=quiet, verbose=verbose)
    given = options["batching"]
    chosen = InferOptions(
        column=column,
        pair_column=pair_column,
        batching=convert(given, BatchingParams, where="the command line") if given else None,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        threads=threads,
        parallel=parallel,
    )
    report = infer(path, data=input, output=output, options=chosen, force=force, reporter=screen.reporter)
    screen.show(report_sections(report), report, summary=True)
