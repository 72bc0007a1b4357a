"""What finished blocks returned on every calibration batch, in the model's own dtype, on disk when it is too much."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class States:
    """Outputs of the last finished block of each stack, by number of the stack and of the batch.

    Args:
        dtype: floating-point numbers are kept in it where it is narrower than they are and holds them all.
        folder: where outputs are kept that do not fit; None keeps all in memory.
        limit: bytes to keep in memory.
    """

    def __init__(self, dtype: torch.dtype, folder: Path | None = None, limit: int = 0) -> None:
        self._dtype = dtype
        self._folder = folder
        self._limit = limit
        self._kept: dict[tuple[int, int], Any] = {}

    def __setitem__(self, key: tuple[int, int], output: Any) -> None:
        """Keep the output of a stack on a batch in the place of a former one."""
        self._kept.pop(key, None)
        narrow = _mapped(output, self._narrow)
        if self._folder is not None and sum(map(_nbytes, self._kept.values())) + _nbytes(narrow) > self._limit:
            with self._file(key).open("wb") as stream:
                torch.save(narrow, stream)
        else:
            self._kept[key] = narrow

    def __getitem__(self, key: tuple[int, int]) -> Any:
        """Return the output of a stack on a batch, in float32."""
        output = self._kept[key] if key in self._kept else torch.load(self._file(key))
        return _mapped(output, _widened)

    def _file(self, key: tuple[int, int]) -> Path:
        assert self._folder is not None, "without a folder everything is kept in memory"
        return self._folder / "states-{}-{:06d}.pt".format(*key)

    def _narrow(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.itemsize <= self._dtype.itemsize:
            return tensor
        narrow = tensor.to(self._dtype)
        return narrow if bool(torch.isfinite(narrow.sum())) or bool(torch.isfinite(narrow).all()) else tensor


def first_rows(output: Any, rows: int, batch: int) -> Any:
    """Return the first rows of every tensor that holds one entry for each of the `batch` rows."""
    return _mapped(output, lambda tensor: tensor[:rows] if tensor.ndim and len(tensor) == batch else tensor)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return what a block returned, a tensor or a tuple of things, with its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return tuple(_mapped(one, change) for one in value)
    return value


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_nbytes, value)) if isinstance(value, tuple) else 0
