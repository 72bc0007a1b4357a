"""Command lines in processes of their own that begin with everything imported: what is tested is their work."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@functools.cache
def context() -> Any:
    """Return what makes them."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["llmopt.pipeline.run", "llmopt.passes.gptq", "transformers.models.llama"])
    return made


def command(
    folder: Path, *arguments: object, said: Path, first: Callable[[], Any] | None = None, **variables: str
) -> Any:
    """Start a command line.

    Args:
        folder: where it works.
        arguments: the command line's.
        said: the file for what it prints.
        first: called in the process before it begins.
        variables: of the environment, beside those of now.
    """
    process = context().Process(
        target=_work, args=(folder, [*map(str, arguments)], said, first, os.environ | variables)
    )
    process.start()
    return process


def _work(
    folder: Path, arguments: list[str], said: Path, first: Callable[[], Any] | None, environment: dict[str, str]
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if first is not None:
        first()
    with said.open("w", buffering=1) as sys.stderr, contextlib.redirect_stdout(sys.stderr):
        from llmopt.__main__ import main

        code = main(arguments)
    os._exit(code)
