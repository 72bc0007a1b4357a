"""What the result of a step depends on, as one hash: the same hash, the same bytes."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import msgspec

from ...core.digests import files_sha256
from ...core.exports import GraphExporter
from ...core.passes import GraphPass, Need, Pass, SurveyPass
from ...core.plan import Limits
from ...core.recipe import Recipe, Task
from ...core.threads import DEFAULT
from ..reads import Reads
from ..steps import AnyPass

_PACKAGES = ("torch", "transformers", "numpy", "tokenizers", "safetensors", "accelerate", "peft", "llmopt")
"""The packages that compute, or read and write what is computed with."""

_OURS = ("core", "models", "calibration", "passes", "pipeline", "evaluation", "runtimes")
"""The folders of llmopt whose code decides what a pass makes, and what is measured of it."""

_GRAPH_PACKAGES = ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "openvino")
_GRAPH_OURS = ("graphs", "exporters")
"""What decides, beside those, what becomes of a graph."""


class Keys:
    """The keys of a recipe's steps, one after another; each holds the one before it.

    Args:
        recipe: gives the model, the seed and the number of threads.
        task: what the model is used for.
        reads: gives hashes of the model and of what passes read.
        rows: calibration samples as token ids.
        data: hash of the calibration data and its column, for a pass that reads text of its own there; None without.
        limits: how many tokens are computed at once changes the last digits.
    """

    def __init__(
        self,
        recipe: Recipe,
        task: Task | None,
        reads: Reads,
        *,
        rows: Sequence[Sequence[int]],
        data: tuple[str, str | None] | None,
        limits: Limits,
    ) -> None:
        self._model, self._reads, self._rows, self._data = recipe.model.id, reads, rows, data
        self._common: dict[str, Any] = {
            "seed": recipe.seed,
            "threads": recipe.threads or DEFAULT,
            "batch_tokens": limits.batch_tokens,
            "statistics_bytes": limits.statistics_bytes,
            "task": task,
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
        passes = [self._described(one) for one in group]
        if not self._known:
            return None
        document = {
            "before": self._so_far(),
            "passes": passes,
            "samples": self._samples() if any(map(uses_samples, group)) else None,
            "data": self._data if any(map(_reads_text, group)) else None,
            "later": [[one.name, msgspec.to_builtins(one.params)] for one in later]
            if any(map(_looks_ahead, group))
            else None,
        }
        self._before = _hash(document)
        return self._before

    def graphs(self, exporter: GraphExporter[Any], passes: Sequence[AnyPass]) -> list[str] | None:
        """Return the keys of an export's graph: as it is traced or read, and after each pass on it.

        Args:
            exporter: the format.
            passes: those on its graph.

        Returns:
            None as for `next`.
        """
        described = [self._described(one) for one in passes]
        if not self._known:
            return None
        params = msgspec.to_builtins(exporter.params)
        traced = {name: value for name, value in params.items() if name not in exporter.late}
        raised = any(map(_reads_attention, passes))
        keys = [_hash([self._so_far(), exporter.name, traced, raised, graph_versions()])]
        for one, words in zip(passes, described, strict=True):
            keys.append(_hash([keys[-1], words, self._samples() if uses_samples(one) else None]))
        return keys

    def _so_far(self) -> str:
        """Return the key of the model as the last step left it."""
        if self._before is None:
            self._before = _hash([self._reads.digest("model", self._model), self._common, versions()])
        return self._before

    def _described(self, one: AnyPass) -> list[Any]:
        read = [self._reads.digest(role, name) for role, name in one.inputs()]
        self._known &= None not in read
        return [one.name, msgspec.to_builtins(one.params), read]

    def _samples(self) -> str:
        return _hash([list(row) for row in self._rows])


def key_of(document: dict[str, Any]) -> str:
    """Return the key of what follows from plain data and the versions of what computes."""
    return _hash([document, versions()])


def uses_samples(one: AnyPass) -> bool:
    """Return whether a pass is shown the calibration samples."""
    return Need.CALIBRATION in one.requires() or (isinstance(one, GraphPass) and one.tries_samples)


def _reads_attention(one: AnyPass) -> bool:
    return isinstance(one, GraphPass) and one.reads_attention


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
    found |= _versions(_PACKAGES, _OURS)
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    found["device"] = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    return found


@cache
def graph_versions() -> dict[str, str]:
    """Return the versions of what traces, changes and runs graphs, beside `versions`."""
    return _versions(_GRAPH_PACKAGES, _GRAPH_OURS)


def _versions(packages: Iterable[str], ours: Iterable[str]) -> dict[str, str]:
    """Return the versions of packages, and a hash of the code in folders of our own."""
    found: dict[str, str] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    package = __name__.partition(".")[0]
    rooms = {room: Path(str(files(f"{package}.{room}"))) for room in ours}
    found[f"{package} code"] = _hash([[room, _code(place)] for room, place in rooms.items()])
    return found


def _code(room: Path) -> str:
    return files_sha256((path.relative_to(room).as_posix(), path) for path in sorted(room.rglob("*.py")))


def _hash(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
