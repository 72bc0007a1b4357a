"""What finished blocks returned on every calibration batch, in the model's own dtype, on disk when it is too much."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..core.errors import is_disk_full


class StateFile(msgspec.Struct, frozen=True, kw_only=True):
    """An output on disk.

    Attributes:
        stack: number of the stack.
        batch: number of the batch.
        name: the file in its folder.
        crc32: checksum of its bytes.
    """

    stack: int
    batch: int
    name: str
    crc32: int


class States:
    """Outputs of the last finished block of each stack, by number of the stack and of the batch.

    Args:
        dtype: floating-point numbers are kept in it where it is narrower than they are and holds them all.
        folder: where outputs are written that do not fit into memory; None keeps all there.
        limit: bytes to keep in memory; None keeps all there.
        lasting: write all of them, so that another process can go on with them. The file of the output before stays
            until the next but one is written: a process that is killed between two leaves one of them whole.

    Attributes:
        lasting: whether it could be done so far; a full disk ends it as long as memory holds what it did not take.
    """

    def __init__(
        self, dtype: torch.dtype, folder: Path | None = None, limit: int | None = None, *, lasting: bool = False
    ) -> None:
        self._dtype = dtype
        self._folder = folder
        self._limit = limit
        self.lasting = lasting
        self._kept: dict[tuple[int, int], Any] = {}
        self._files: dict[tuple[int, int], StateFile] = {}

    def __setitem__(self, key: tuple[int, int], output: Any) -> None:
        """Keep the output of a stack on a batch in the place of a former one."""
        self._kept.pop(key, None)
        narrow = _mapped(output, self._narrow)
        fits = (
            self._folder is None
            or self._limit is None
            or sum(map(_nbytes, self._kept.values())) + _nbytes(narrow) <= self._limit
        )
        if fits:
            self._kept[key] = narrow
        if self.lasting or not fits:
            try:
                self._write(key, narrow)
            except OSError as error:
                if not fits or not is_disk_full(error):
                    raise
                self.lasting = False

    def __getitem__(self, key: tuple[int, int]) -> Any:
        """Return the output of a stack on a batch, in float32."""
        output = self._kept[key] if key in self._kept else torch.load(self._place / self._files[key].name)
        return _mapped(output, _widened)

    @property
    def files(self) -> list[StateFile]:
        """The newest outputs on disk."""
        return list(self._files.values())

    def take_up(self, files: Mapping[tuple[int, int], StateFile]) -> None:
        """Go on with the outputs that another process has written to the folder."""
        self._files = dict(files)
        if self._limit is None:
            self._kept = {key: torch.load(self._place / file.name) for key, file in files.items()}

    @property
    def _place(self) -> Path:
        assert self._folder is not None, "without a folder everything is kept in memory"
        return self._folder

    def _write(self, key: tuple[int, int], output: Any) -> None:
        before = self._files.get(key)
        turn = "b" if before is not None and before.name.endswith("a.pt") else "a"
        stream = io.BytesIO()
        torch.save(output, stream)
        name = "states-{}-{:06d}-{}.pt".format(*key, turn)
        (self._place / name).write_bytes(stream.getbuffer())
        self._files[key] = StateFile(stack=key[0], batch=key[1], name=name, crc32=zlib.crc32(stream.getbuffer()))

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
