"""What the result of a step depends on, as one hash: the same hash, the same bytes."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import msgspec

from ...core.passes import Need, Pass, SurveyPass
from ...core.plan import Limits
from ...core.recipe import ModelSpec, Recipe
from ...core.threads import DEFAULT
from ...models.locate import Location, locate, looks_like_hub_id
from ...models.sentence import MODULES
from ...models.side_files import side_files
from ..steps import AnyPass

_PACKAGES = ("torch", "transformers", "numpy", "tokenizers", "safetensors", "accelerate", "peft", "llmopt")
"""The packages that compute, or read and write what is computed with."""

_OURS = ("core", "models", "calibration", "passes", "pipeline")
"""The folders of llmopt whose code decides what a pass makes."""


class Keys:
    """The keys of a recipe's steps, one after another; each holds the one before it.

    Args:
        recipe: gives the seed and the number of threads.
        location: the model.
        weights: waits for the hash of its weights.
        rows: calibration samples as token ids.
        data: hash of the calibration data and its column, for a pass that reads text of its own there; None without.
        limits: how many tokens are computed at once changes the last digits.
    """

    def __init__(
        self,
        recipe: Recipe,
        location: Location,
        weights: Callable[[], str],
        *,
        rows: Sequence[Sequence[int]],
        data: tuple[str, str | None] | None,
        limits: Limits,
    ) -> None:
        self._location, self._weights, self._rows, self._data = location, weights, rows, data
        self._common: dict[str, Any] = {
            "seed": recipe.seed,
            "threads": recipe.threads or DEFAULT,
            "batch_tokens": limits.batch_tokens,
            "statistics_bytes": limits.statistics_bytes,
            "task": location.task,
        }
        self._before: str | None = None
        self._known = True

    def next(self, group: Sequence[AnyPass], later: Sequence[AnyPass]) -> str | None:
        """Return the key of the next step.

        Args:
            group: its passes.
            later: those behind it, which some surveys look at.

        Returns:
            None when it reads what cannot be told from its name, such as a data set of the hub; then that holds for all
            later steps.
        """
        passes: list[Any] = []
        for one in group:
            read = [_digest(name) for name in one.inputs()]
            self._known &= None not in read
            passes.append([one.name, msgspec.to_builtins(one.params), read])
        if not self._known:
            return None
        if self._before is None:
            self._before = _hash([self._weights(), _beside(self._location), self._common, versions()])
        document = {
            "before": self._before,
            "passes": passes,
            "samples": _hash([list(row) for row in self._rows]) if any(map(uses_samples, group)) else None,
            "data": self._data if any(map(_reads_text, group)) else None,
            "later": [[one.name, msgspec.to_builtins(one.params)] for one in later]
            if any(map(_looks_ahead, group))
            else None,
        }
        self._before = _hash(document)
        return self._before


def uses_samples(one: AnyPass) -> bool:
    """Return whether a pass is shown the calibration samples."""
    return Need.CALIBRATION in one.requires()


def _reads_text(one: AnyPass) -> bool:
    text: Any = cast("Any", Pass).text
    return type(one).text is not text


def _looks_ahead(one: AnyPass) -> bool:
    prepare: Any = cast("Any", SurveyPass).prepare
    return isinstance(one, SurveyPass) and type(one).prepare is not prepare


@cache
def versions() -> dict[str, str]:
    """Return the versions of what computes: packages, this package's own code, the processor's instructions."""
    import torch

    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    package = __name__.partition(".")[0]
    rooms = {room: Path(str(files(f"{package}.{room}"))) for room in _OURS}
    found[f"{package} code"] = _hash([[room, _folder(place, "*.py")] for room, place in rooms.items()])
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    found["device"] = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    return found


def _beside(location: Location) -> str:
    """Return a hash of what lies beside the weights: settings, tokenizer, code, modules of sentence-transformers."""
    found = [*side_files(location.folder, with_config=True, with_code=location.trust_remote_code)]
    root = location.folder
    if location.sentence is not None:
        root = location.sentence.root
        found += [root / MODULES, *(path for one in location.sentence.dense for path in one.folder.iterdir())]
    return _files(root, {path for path in found if path.is_file()})


def _digest(name: str) -> str | None:
    """Return a hash of a file, a folder or a model of the hub, None where the name does not tell what is read."""
    path = Path(name).expanduser()
    if path.is_file():
        return _file(path)
    if path.is_dir():
        return _folder(path)
    if name.startswith("hf:") or not looks_like_hub_id(name):
        return None
    return _folder(locate(ModelSpec(id=name)).folder)


def _folder(folder: Path, pattern: str = "*") -> str:
    return _files(folder, (path for path in folder.rglob(pattern) if path.is_file()))


def _files(root: Path, paths: Iterable[Path]) -> str:
    return _hash([[path.relative_to(root).as_posix(), _file(path)] for path in sorted(paths)])


def _file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hash(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
