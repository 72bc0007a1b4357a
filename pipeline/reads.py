"""What a run reads: every file, what it is read for, and that it stays as it is until the run has ended."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, cast

from ..calibration.hub import parse_hub_spec
from ..core.digests import file_sha256, files_sha256
from ..core.errors import LlmoptError
from ..core.manifest import InputRecord
from ..core.reads import Read, Role
from ..core.recipe import ModelSpec, Recipe
from ..models.checkpoint import INDEX, Checkpoint
from ..models.locate import Location, locate
from ..models.onnx_file import external_tensors, open_graph
from ..models.sentence import MODULES
from ..models.side_files import side_files
from .background import in_background
from .steps import AnyPass


def files_read(
    recipe: Recipe,
    passes: Iterable[AnyPass],
    *,
    written_in: Path | None = None,
    named: Iterable[tuple[str, Path]] = (),
) -> tuple[Read, ...]:
    """Return every file that is read when a recipe is run; a data set of the hub is none.

    Args:
        recipe: what will be run.
        passes: its passes, which say what they read beside the model.
        written_in: the file that holds the recipe, None where no file does.
        named: files that test data name, behind what the recipe calls the data.

    Raises:
        LlmoptError: one of them is not there.
    """
    found = [] if written_in is None else [Read("recipe", str(written_in), written_in.name, written_in)]
    found += (one for _, _, listed in _listings(recipe, passes) for one in listed())
    found += (Read("evaluation", data, os.path.relpath(path, Path(data).parent), path) for data, path in named)
    return tuple(dict.fromkeys(found))


def files_now(recipe: Recipe, passes: Iterable[AnyPass]) -> Iterator[Read]:
    """Yield what a run would read if it began now, but for the recipe and what data name, which follow from the rest.

    A model of the hub is not looked for again: its snapshot holds what a commit holds.

    Args:
        recipe: what is run.
        passes: its passes.

    Returns:
        The files; the folder itself where they can no longer be listed, which was possible when the run began.
    """
    for role, name, listed in _listings(recipe, passes):
        if role in {"model", "teacher"} and not Path(name).expanduser().exists():
            continue
        try:
            yield from tuple(listed())
        except LlmoptError:
            yield Read(role, name, ".", Path(name))


def _listings(recipe: Recipe, passes: Iterable[AnyPass]) -> Iterator[tuple[Role, str, Callable[[], Iterable[Read]]]]:
    """Yield what is read for what, as the recipe calls it, and a function that lists its files."""
    yield "model", recipe.model.id, partial(_of_model, "model", recipe.model)
    if recipe.calibration is not None:
        yield "calibration", recipe.calibration.data, partial(_of_text, "calibration", recipe.calibration.data)
    for data in (spec.data for spec in recipe.evaluation if spec.data is not None):
        yield "evaluation", data, partial(_of_text, "evaluation", data)
    for role, name in (named for one in passes for named in one.inputs()):
        if role == "teacher":
            spec = ModelSpec(id=name, trust_remote_code=recipe.model.trust_remote_code)
            yield role, name, partial(_of_model, role, spec)
        else:
            yield role, name, partial(_of_adapter if role == "adapter" else _of_text, role, name)


def _of_model(role: Role, spec: ModelSpec) -> Iterator[Read]:
    location = locate(spec)
    root = location.folder if location.sentence is None else location.sentence.root
    return _inside(role, spec.id, root, _model_files(location))


def _model_files(location: Location) -> Iterator[Path]:
    """Yield the files of a model that are read or copied."""
    folder, code = location.folder, location.trust_remote_code
    if location.graph is not None:
        yield location.graph
        tensors = cast("Iterator[Any]", external_tensors(open_graph(location.graph)))
        yield from sorted({folder / str(tensor.location) for tensor in tensors})
    else:
        yield from Checkpoint(folder).files
        yield from _matching(folder, INDEX)
    yield from side_files(folder, with_config=True, with_code=code)
    if location.sentence is not None:
        root = location.sentence.root
        yield root / MODULES
        yield from side_files(root, with_config=True)
        for module in location.sentence.modules[1:]:
            yield from _matching(root / str(module["path"]), "config.json", "model.safetensors")


def _of_adapter(role: Role, spec: str) -> Iterator[Read]:
    return _inside(role, spec, Path(spec), _matching(Path(spec), "adapter_config.json", "*.safetensors"))


def _of_text(role: Role, spec: str) -> Iterator[Read]:
    path = Path(spec)
    if spec.startswith("hf:"):
        hub = parse_hub_spec(spec)
        if not hub.local:
            return iter(())
        path = Path(hub.name)
    if not path.is_dir():
        return _inside(role, spec, path.parent, [path])
    return _inside(role, spec, path, (file for file in sorted(path.rglob("*")) if file.is_file()))


def _inside(role: Role, source: str, root: Path, paths: Iterable[Path]) -> Iterator[Read]:
    return (Read(role, source, path.relative_to(root).as_posix(), path) for path in paths)


def _matching(folder: Path, *patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]


def paths_of(files: Iterable[Read]) -> list[Path]:
    """Return where files lie, each once, in order."""
    return sorted({one.path for one in files})


def steady(files: Iterable[Read]) -> list[Read]:
    """Return the files that must stay as they are; the recipe was read whole before, and the manifest holds it."""
    return [one for one in files if one.role != "recipe"]


class Look(NamedTuple):
    """How a file looks from outside: its size, the time of its last change in ns, and its place on the disk."""

    bytes: int
    mtime_ns: int
    place: int


def look(path: Path) -> Look | None:
    """Return how a file looks; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return Look(found.st_size, found.st_mtime_ns, found.st_ino)


class Reads:
    """The files that a run reads, as they are when it begins; the hash of each is computed once, beside the work.

    Args:
        files: what is read.
        now: lists what would be read now, to see what has appeared.
    """

    def __init__(self, files: Iterable[Read], now: Callable[[], Iterable[Read]] = tuple) -> None:
        self._files, self._now = steady(files), now
        self._before = {path: look(path) for path in paths_of(self._files)}
        self._locks = {path: Lock() for path in self._before}
        self._known: dict[Path, tuple[str, bool]] = {}
        in_background(lambda: [self.sha256(path) for path in self._before])

    def sha256(self, path: Path) -> str:
        """Return the hash of a file, once it is known.

        Raises:
            LlmoptError: it cannot be read.
        """
        return self._hashed(path)[0]

    def digest(self, role: Role, source: str) -> str | None:
        """Return one hash over all files that are read for something, None where there is no file, but a data set.

        Args:
            role: what they are read for.
            source: what the recipe calls them.
        """
        found = sorted((one.name, one.path) for one in self._files if (one.role, one.source) == (role, source))
        return files_sha256(found, self.sha256) if found else None

    def records(self) -> list[InputRecord]:
        """Return what identifies each file, once all hashes are known.

        Raises:
            LlmoptError: one cannot be read.
        """
        hashes = {path: self.sha256(path) for path in self._before}
        return [
            InputRecord(path=str(path), bytes=before.bytes, mtime_ns=before.mtime_ns, sha256=hashes[path])
            for path, before in self._before.items()
            if before is not None
        ]

    def changed(self) -> list[Read]:
        """Return the files that look different now, and those that were not there and would be read."""
        different = [one for one in self._files if look(one.path) != self._before[one.path]]
        return different + [one for one in self._now() if one.path not in self._before]

    def check(self) -> None:
        """Make sure that what was read is what was hashed: a file that looks different must have the same bytes.

        Raises:
            LlmoptError: it has others, it changed before its hash was known, or it was not there when the run began.
        """
        changed = paths_of(self.changed())
        others = sorted(
            (path for path in changed if not self._same_bytes(path)), key=lambda path: path not in self._before
        )
        if not others:
            return
        verb, where = "was changed while it was read", "what is read in it can no longer be told"
        if others[0] in self._before:
            where = (
                f"{len(changed)} of {len(self._before)} files have another size, time or place on the disk than "
                "when the run began"
            )
        elif others[0].is_file():
            verb, where = "appeared while it was to be read", "there was no such file when the run began"
        hint = "nothing was written: run it again once nobody writes there"
        raise LlmoptError(f"`{others[0]}` {verb}", where=where, hint=hint)

    def _same_bytes(self, path: Path) -> bool:
        if path not in self._before:
            return False
        digest, as_before = self._hashed(path)
        return as_before and path.is_file() and file_sha256(path) == digest

    def _hashed(self, path: Path) -> tuple[str, bool]:
        """Return the hash of a file, and whether it still looked as when the run began once that was computed."""
        with self._locks[path]:
            if path not in self._known:
                try:
                    digest = file_sha256(path)
                except OSError as error:
                    hint = "it is read until the run has ended: run it again once it is there"
                    raise LlmoptError(f"cannot read `{path}`", where=error.strerror, hint=hint) from None
                self._known[path] = digest, look(path) == self._before[path]
            return self._known[path]
