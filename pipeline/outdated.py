"""Whether an artifact is what a plan would make now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from ..core.errors import LlmoptError
from ..core.manifest import RUN, InputRecord, Manifest
from ..core.plan import Plan
from ..core.reads import Read
from .artifact import read_manifest, read_run
from .output import file_record
from .reads import look, paths_of, steady


def why_outdated(plan: Plan, output: Path, versions: dict[str, str]) -> str | None:
    """Return why an artifact is not what a plan would make now, None if it is.

    Sizes and times of files are looked at first; what differs in them is hashed.

    Args:
        plan: the checked plan.
        output: the artifact's folder.
        versions: of llmopt, Python and the libraries, by name.
    """
    try:
        manifest, run = read_manifest(output), read_run(output)
    except LlmoptError as error:
        return error.what
    if manifest is None or run is None:
        return "there is no artifact" if manifest is None else f"there is no {RUN} in it"
    if manifest.recipe != msgspec.to_builtins(plan.recipe.to_dict()):
        return "the recipe is another"
    if {"llmopt": manifest.llmopt, **manifest.versions} != versions:
        return "versions are others"
    limits = msgspec.to_builtins(plan.limits)
    if any(limits.get(name) != limit for name, limit in manifest.limits.items()):
        return "the limits of memory are others"
    return _other_input(plan.reads, run.inputs) or _other_output(manifest, output)


def _other_input(files: Sequence[Read], records: Sequence[InputRecord]) -> str | None:
    if [str(path) for path in paths_of(steady(files))] != [record.path for record in records]:
        return "other files are read"
    changed = next((record.path for record in records if not _same(record)), None)
    return None if changed is None else f"{changed} was changed"


def _same(record: InputRecord) -> bool:
    """Return whether a file is the one of which the record tells; it is hashed only where its time is another."""
    path, found = Path(record.path), look(Path(record.path))
    if found is None or found.bytes != record.bytes:
        return False
    return found.mtime_ns == record.mtime_ns or file_record(path).sha256 == record.sha256


def _other_output(manifest: Manifest, output: Path) -> str | None:
    """Return which file of the artifact is not whole; one that is no newer than the record of its run is not hashed."""
    written = (output / RUN).stat().st_mtime_ns
    every = {output / name: file for name, file in manifest.files.items()}
    for record in manifest.exports:
        every |= {output / record.directory / name: file for name, file in record.files.items()}
    for path, expected in every.items():
        if not path.is_file() or path.stat().st_size != expected.bytes:
            return f"{path} is missing or was changed"
        if path.stat().st_mtime_ns > written and file_record(path) != expected:
            return f"{path} was changed"
    return None
