"""Writing an artifact aside and putting it in place whole: an interrupted run leaves the old artifact or none."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.digests import file_sha256
from ..core.ends import undone_by, whole
from ..core.errors import UsageError
from ..core.manifest import MANIFEST, FileRecord
from ..core.processes import is_main
from .cache.locks import Lock, lock_file

_PARTIAL, _FORMER = ".partial", ".former"
_HELPING = ".helping.partial"
"""Of the folder of a process that trains with the one that writes the artifact."""

_OWNER = "owner"
"""The file in it whose lock tells that its run lives."""

_ELSEWHERE = "give a folder you may write to with -o"


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
        with whole:
            replace_folder(self.root, self._output)

    def set_aside(self) -> Path:
        """Move the artifact to `OUTPUT.failed`, for a look at what went wrong, and return that path."""
        failed = failed_folder(self._output)
        with whole:
            replace_folder(self.root, failed)
        return failed


@contextmanager
def staging(output: Path, *, force: bool, inputs: Sequence[Path] = ()) -> Generator[Staging]:
    """Have a staging folder for `output`; see `check_output`.

    Raises:
        UsageError: the output exists and `force` is not set, is not one of ours, cannot be written, or another run
            writes it.
    """
    check_output(output, force=force, inputs=inputs)
    output = output.resolve() if ".." in output.parts else output
    made = [parent for parent in output.parents if not parent.exists()]
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            folder, claim = _claim(output)
        except OSError as error:
            raise UsageError(f"cannot write to `{output.parent}`", where=error.strerror, hint=_ELSEWHERE) from None
        with undone_by(lambda: _remove(folder, made)):
            try:
                yield Staging(output, folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                claim.release()
    finally:
        _remove_empty(made)


def _remove(folder: Path, made: Sequence[Path]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _remove_empty(made)


def _remove_empty(made: Sequence[Path]) -> None:
    """Remove the folders that were made for the output, the innermost first; one that holds something now stays."""
    for parent in made:
        with suppress(OSError):
            parent.rmdir()


def _claim(output: Path) -> tuple[Path, Lock]:
    """Make a folder beside `output` that says who writes it, and remove those of runs that were killed.

    Raises:
        UsageError: another run writes the same output.
    """
    ending = _PARTIAL if is_main() else _HELPING
    with _alone(output.parent):
        for left in _left(output, _PARTIAL, _HELPING):
            lock = Lock(left / _OWNER)
            if _remove_dead(left, lock) or left.name.endswith(_HELPING) or not is_main():
                continue
            raise UsageError(
                f"another run writes `{output}`",
                where=lock.holder(),
                hint="wait until it has ended, or give another folder with -o",
            )
        if is_main():
            _bring_back(output)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=ending, dir=output.parent))
        claim = Lock(folder / _OWNER)
        with suppress(OSError):  # a disk that knows no locks: nobody will be refused
            claim.take()
    return folder, claim


def _left(output: Path, *endings: str) -> list[Path]:
    """Return the folders beside `output` that runs on it have made, dead or alive."""
    ours = re.compile(rf"\.{re.escape(output.name)}\.\w{{8}}({'|'.join(map(re.escape, endings))})")
    return sorted(path for path in output.parent.iterdir() if ours.fullmatch(path.name))


def _remove_dead(folder: Path, lock: Lock) -> bool:
    """Remove the folder of a run that was killed; return whether nobody works in it."""
    try:
        if not (folder / _OWNER).exists():
            folder.rmdir()
        elif lock.take():
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()
        else:
            return False
    except OSError:  # without locks, or with files of a version that took none, one cannot tell; it stays
        lock.release()
    return True


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Let one run at a time look at a folder and make its own in it, where the disk knows locks."""
    try:
        file = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            lock_file(file)
        yield
    finally:
        os.close(file)


def _bring_back(output: Path) -> None:
    """Put the former artifact back where a run was killed as it replaced it, and remove what such runs have left."""
    for left in _left(output, _FORMER):
        if not output.exists() and (left / "artifact").is_dir():
            (left / "artifact").rename(output)
        shutil.rmtree(left, ignore_errors=True)


def check_output(output: Path, *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse an output that must not or cannot be replaced.

    Args:
        output: the folder to write.
        force: replace a former artifact of ours.
        inputs: files and folders that are read; an output that holds one of them would destroy it.

    Raises:
        UsageError: it exists and `force` is not set, is no artifact of ours, or holds an input.
    """
    try:
        _check_place(output)
        place = output.resolve()
        if not output.exists():
            return
        former = any(output.iterdir())
    except OSError as error:
        raise UsageError(f"cannot write to `{output}`", where=error.strerror, hint=_ELSEWHERE) from None
    if place in (Path.cwd(), *Path.cwd().parents):
        raise UsageError(
            f"`{output}` is the folder you are in, or one above it",
            where=str(place),
            hint="an artifact replaces its folder whole: give the name of a folder in it with -o",
        )
    if os.path.ismount(place):
        raise UsageError(
            f"`{output}` is a mount point",
            where="an artifact replaces its folder whole, which a mount point does not allow",
            hint=f"give a folder in it: -o {output / 'model'}",
        )
    if not former:
        return
    if not (output / MANIFEST).is_file():
        raise UsageError(
            f"`{output}` exists and is no artifact of llmopt",
            where=f"there is no {MANIFEST} in it",
            hint="give another folder with -o, or remove it yourself",
        )
    for path in inputs:
        # A link in the output is lost with it, wherever it leads.
        if any(one.is_relative_to(place) for one in (path.resolve(), path.parent.resolve() / path.name)):
            raise UsageError(f"`{output}` holds what is read", where=str(path), hint="give another folder with -o")
    if not force:
        raise UsageError(f"`{output}` exists already", hint="replace it with --force, or give another folder with -o")


def failed_folder(output: Path) -> Path:
    """Return where an artifact goes whose verification failed: never over something that is not an artifact of ours."""
    names = (f"{output.name}.failed{number}" for number in ("", *(f".{index}" for index in range(2, 1000))))
    places = (output.with_name(name) for name in names)
    return next(place for place in places if not place.exists() or (place / MANIFEST).is_file())


def _check_place(output: Path) -> None:
    """Refuse a path that no folder can have."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UsageError(f"`{output}` is not a folder", hint="give another one with -o")
    above = next((parent for parent in output.parents if parent.exists()), output)
    if not above.is_dir():
        raise UsageError(f"cannot write to `{output}`", where=f"`{above}` is not a folder", hint=_ELSEWHERE)
    if not output.exists() and not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write to `{output}`", where=f"`{above}` may not be written to", hint=_ELSEWHERE)


def replace_folder(new: Path, place: Path) -> None:
    """Rename `new` to `place`, keeping a former `place` until that has succeeded."""
    former = None
    if place.exists():
        former = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=_FORMER, dir=place.parent)) / "artifact"
    try:
        if former is not None:
            place.rename(former)
        new.rename(place)
    except BaseException:
        if former is not None and former.exists():
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
            records[relative] = file_record(path)
    return records


def file_record(path: Path) -> FileRecord:
    """Return size and SHA-256 of a file."""
    digest = file_sha256(path)
    return FileRecord(bytes=path.stat().st_size, sha256=digest)


def readable(root: Path) -> None:
    """Give files the permissions that the user's umask gives; temporary folders begin private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [root, *root.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
