"""A teacher's most likely tokens on disk, so that it computes each row once, in this run and in later ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...core.errors import UsageError

if TYPE_CHECKING:
    from .order import Batch

_META = "answers.json"


class LogitCache:
    """The log probabilities of the most likely tokens at every position, in half precision.

    Three files: token numbers (int32) and log probabilities (float16), both (tokens, top), and which rows are there.
    What is used is always what was rounded to half precision, so a run does not depend on what the cache held before.

    Args:
        folder: where it lies; made when it is not there.
        identity: what the answers depend on: teacher, text, temperature.
        rows: the rows, by number.
        top: how many tokens are kept at a position.
        temperature: what logits are divided by.

    Raises:
        UsageError: the folder holds answers to something else.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        rows: Sequence[Sequence[int]],
        *,
        top: int,
        temperature: float,
    ) -> None:
        self._top, self._temperature = top, temperature
        self._starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        described = {**identity, "top": top, "temperature": temperature, "rows": len(rows)}
        _claim(folder, described)
        shape = (int(self._starts[-1]), top)
        self._ids = _array(folder / "ids.bin", np.int32, shape)
        self._logs = _array(folder / "logs.bin", np.float16, shape)
        self._done = _array(folder / "done.bin", np.uint8, (len(rows),))

    def holds(self, rows: Sequence[int]) -> bool:
        """Return whether the answers to all of `rows` are here."""
        return bool(self._done[list(rows)].all())

    def put(self, batch: Batch, logits: Tensor) -> None:
        """Keep the answers to a batch, (batch, sequence, classes)."""
        logs = torch.log_softmax(logits.float() / self._temperature, -1)
        values, ids = logs.topk(self._top, dim=-1)
        for index, row in enumerate(batch.rows):
            start, stop = self._starts[row], self._starts[row + 1]
            self._ids[start:stop] = ids[index, : stop - start].cpu().numpy()
            self._logs[start:stop] = values[index, : stop - start].cpu().numpy()
        self._ids.flush()
        self._logs.flush()
        self._done[batch.rows] = 1  # last: what is marked is whole, whenever the run is killed
        self._done.flush()

    def get(self, batch: Batch) -> dict[str, Tensor]:
        """Return `top_ids` and `top_logs`, (batch, sequence, top); zeros where a row is padded."""
        shape = (*batch.ids.shape, self._top)
        ids, logs = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        for index, row in enumerate(batch.rows):
            start, stop = self._starts[row], self._starts[row + 1]
            ids[index, : stop - start] = torch.from_numpy(np.array(self._ids[start:stop])).long()
            logs[index, : stop - start] = torch.from_numpy(np.array(self._logs[start:stop])).float()
        return {"top_ids": ids, "top_logs": logs}


def _claim(folder: Path, described: Mapping[str, Any]) -> None:
    """Make the folder, or see that it holds answers to the same questions."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _META
    if not path.exists():
        if any(folder.iterdir()):
            raise UsageError(
                f"`{folder}` is no cache of a teacher's answers",
                where="it holds other files",
                hint="name a new folder as `cache`",
            )
        path.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        known = {}
    different = sorted(key for key in {*known, *described} if known.get(key) != described.get(key))
    if different:
        raise UsageError(
            f"`{folder}` holds a teacher's answers to something else",
            where=f"different: {', '.join(different)}",
            hint="name another folder as `cache`, or remove this one",
        )


def _array(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not path.exists() or path.stat().st_size != size:
        with path.open("ab") as file:
            file.truncate(size)
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)
