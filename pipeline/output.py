"""Writing an artifact aside and putting it in place whole: an interrupted run leaves the old artifact or none."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ..core.errors import UsageError
from ..core.manifest import MANIFEST, FileRecord


class Staging:
    """A folder beside the output, on the same disk, that becomes the output or vanishes.

    Attributes:
        root: what will be the artifact.
        work: scratch space, removed at the end.
    """

    def __init__(self, output: Path, folder: Path) -> None:
        self._output = output
        self.root = folder / "artifact"
        self.work = folder / "work"
        self.root.mkdir()
        self.work.mkdir()

    def commit(self) -> None:
        """Put the artifact in place; a former one is removed only once the new one stands."""
        replace_folder(self.root, self._output)

    def set_aside(self) -> Path:
        """Move the artifact to `OUTPUT.failed`, for a look at what went wrong, and return that path."""
        failed = self._output.with_name(f"{self._output.name}.failed")
        replace_folder(self.root, failed)
        return failed


@contextmanager
def staging(output: Path, *, force: bool) -> Generator[Staging]:
    """Have a staging folder for `output`.

    Raises:
        UsageError: the output exists and `force` is not set, is not one of ours, or cannot be written.
    """
    check_output(output, force=force)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    except OSError as error:
        raise UsageError(
            f"cannot write to `{output.parent}`", where=error.strerror, hint="give a folder you may write to with -o"
        ) from None
    try:
        yield Staging(output, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_output(output: Path, *, force: bool) -> None:
    """Refuse an output that must not be replaced.

    Raises:
        UsageError: it exists and `force` is not set, or it is no artifact of ours.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UsageError(f"`{output}` is not a folder", hint="give another one with -o")
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / MANIFEST).is_file():
        raise UsageError(
            f"`{output}` exists and is no artifact of llmopt",
            where=f"there is no {MANIFEST} in it",
            hint="give another folder with -o, or remove it yourself",
        )
    if not force:
        raise UsageError(f"`{output}` exists already", hint="replace it with --force, or give another folder with -o")


def replace_folder(new: Path, place: Path) -> None:
    """Rename `new` to `place`, keeping a former `place` until that has succeeded."""
    former = None
    if place.exists():
        former = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".former", dir=place.parent)) / "artifact"
        place.rename(former)
    try:
        new.rename(place)
    except BaseException:
        if former is not None:
            former.rename(place)
        raise
    finally:
        if former is not None:
            shutil.rmtree(former.parent, ignore_errors=True)


def file_records(root: Path, *, skip: frozenset[str] = frozenset({MANIFEST})) -> dict[str, FileRecord]:
    """Return size and SHA-256 of every file below `root`, by relative path."""
    records: dict[str, FileRecord] = {}
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root).as_posix()
        if path.is_file() and relative not in skip:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            records[relative] = FileRecord(bytes=path.stat().st_size, sha256=digest)
    return records


def readable(root: Path) -> None:
    """Give files the permissions that the user's umask gives; temporary folders begin private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [root, *root.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
