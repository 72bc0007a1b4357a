"""Options that several commands have, declared once."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import UsageError, nearest
from ..core.quantities import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..pipeline.cache.store import CacheSettings
    from .render import Screen

_OUTPUT = "Output"
CALIBRATION_PANEL = "Calibration"
CACHE_PANEL = "Cache"

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML; `llmopt schema` describes it.")]
RecipeFiles = Annotated[
    list[Path], typer.Argument(metavar="RECIPE", help="A recipe in YAML; `llmopt schema` describes it.")
]
Artifact = Annotated[Path, typer.Argument(metavar="DIR", help="An artifact: a folder with llmopt.json.")]
Repository = Annotated[str, typer.Argument(metavar="REPO", help="A repository of the hub: org/name.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder or a hub id.")]
ModelOrArtifact = Annotated[str, typer.Argument(metavar="PATH", help="A model folder, a hub id or an artifact.")]
TextSpec = Annotated[
    str,
    typer.Option(metavar="SPEC", help="A .txt, .jsonl, .csv or .parquet file, or hf:NAME[/CONFIG][:SPLIT]. Required."),
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors: no progress, no notes, no summary.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More progress, and tracebacks of errors.")]
Force = Annotated[
    bool,
    typer.Option("--force", help="Replace DIR when it exists, once everything is done.", rich_help_panel=_OUTPUT),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        metavar="DIR",
        help="Where results of passes are kept for later runs. [default: LLMOPT_CACHE_DIR, or ~/.cache/llmopt]",
        rich_help_panel=CACHE_PANEL,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="SPEC",
        help="Text like that which the model will see: a .txt, .jsonl, .csv or .parquet file, or "
        "hf:NAME[/CONFIG][:SPLIT].",
        rich_help_panel=CALIBRATION_PANEL,
    ),
]


def check_choice(option: str, value: str | None, choices: tuple[str, ...]) -> None:
    """Refuse a value that an option does not take; None is an option that was not given.

    Raises:
        UsageError: it names those that it takes.
    """
    if value is not None and value not in choices:
        raise UsageError(
            f"bad value for {option}: {value}", where=f"expected {' or '.join(choices)}", hint=nearest(value, choices)
        )


def cache_settings(folder: Path | None) -> CacheSettings:
    """Return where results of passes are kept and how much of them, as options and the environment say.

    Raises:
        UsageError: LLMOPT_CACHE_SIZE is no size.
    """
    from ..pipeline.cache.store import CacheSettings, default_folder

    written = os.environ.get("LLMOPT_CACHE_SIZE")
    limit = None if not written else 0 if written == "0" else parse_size(written, where="LLMOPT_CACHE_SIZE")
    return CacheSettings(default_folder() if folder is None else folder.expanduser(), limit)


def parse_columns(written: Iterable[str], option: str) -> dict[str, str]:
    """Read `[ROLE=]NAME`: columns by role, under "" the one without a role.

    Raises:
        UsageError: a role has two columns.
    """
    columns: dict[str, str] = {}
    for text in written:
        role, equals, name = text.partition("=")
        role, name = (role.strip(), name.strip()) if equals else ("", text)
        if role in columns:
            raise UsageError(f"{option} names two columns for {role or 'the text'}", where=f"{columns[role]}, {name}")
        columns[role] = name
    return columns


def open_screen(*, json: bool, quiet: bool, verbose: bool) -> Screen:
    """Return where the command shows its results, and keep libraries from writing beside it.

    Raises:
        UsageError: quiet and verbose at once.
    """
    from .render import Screen

    if quiet and verbose:
        raise UsageError("--quiet and --verbose exclude each other")
    if not verbose:
        _hush_libraries(bars=not quiet and sys.stderr.isatty())
    return Screen(json=json, quiet=quiet, verbose=verbose)


def _hush_libraries(*, bars: bool) -> None:
    """Turn off what libraries log and warn of; they read these variables when they are imported."""
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    if not bars:  # a download is the one thing that may show a bar of its own
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
