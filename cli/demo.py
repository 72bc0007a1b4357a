"""`llmopt demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Force, Json, Quiet, Verbose, open_screen


def command(
    *,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="The folder to write. [default: demo-output]"),
    ] = Path("demo-output"),
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize the bundled model and compare it with the original.

    GPTQ to 4 bits with calibration data, exported for transformers and for ONNX Runtime GenAI, verified, and measured:
    size, perplexity and speed before and after. Needs no network.
    """
    from ..pipeline.demo import demo
    from .views import report_sections

    screen = open_screen(json=json, quiet=quiet, verbose=verbose)
    report = demo(output, force=force, reporter=screen.reporter)
    screen.show(report_sections(report), report, summary=True)
