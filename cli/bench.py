"""`llmopt bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Json, ModelOrArtifact, Quiet, Verbose, open_screen


def command(
    path: ModelOrArtifact,
    *,
    against: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Measure this one in turns with the other, and show the ratio."),
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Measurements. [default: 5]")] = 5,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of the prompt. [default: 128]")] = 128,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to generate. [default: 32]")] = 32,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads to compute with. [default: all cores]")
    ] = None,
    input: Annotated[  # noqa: A002  (the name of the option)
        str | None,
        typer.Option(
            "--input", "-i", metavar="FILE", help="For encoders: measure the first 64 texts of a file, 8 at once."
        ),
    ] = None,
    column: Annotated[str | None, typer.Option(metavar="NAME", help="The column that holds the text.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure load time, speed and memory of a model or an artifact.

    Shows medians: time to load, size on disk, tokens a second while the prompt is read and while text is generated (for
    models that do not generate: texts and tokens a second, how far batches are filled, and the latency of a batch), and
    peak memory.

        llmopt bench my-llama-int4 --against ./my-llama
    """
    from ..pipeline.bench import bench
    from .views import report_sections

    screen = open_screen(json=json, quiet=quiet, verbose=verbose)
    report = bench(
        path,
        against=against,
        repeats=repeats,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=threads,
        data=input,
        column=column,
        reporter=screen.reporter,
    )
    screen.show(report_sections(report), report)
