"""A folder of safetensors shards: their headers read and checked, their tensors left on disk.

The header is parsed here rather than by the safetensors library because a plan needs it without torch and numpy, and
because a header that lies about sizes deserves a message that names the tensor.
"""

from __future__ import annotations

import copy
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from glob import escape
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.digests import Digest, file_sha256, files_sha256
from ..core.errors import LlmoptError
from ..core.untrusted import MAX_JSON, UnreadableError, check_links, is_plain_name, parse_json, read_json

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
_MAX_DIMENSIONS = 64
_MAX_NUMBER = 1 << 62
_MAX_TENSORS = 1_000_000
_FETCH_AGAIN = "the checkpoint is damaged: fetch or save it again"

DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""safetensors' dtype -> torch's name and bytes."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a shard.

    Attributes:
        shard: file that holds it.
        dtype: torch's name of its dtype.
        shape: its shape.
        nbytes: its bytes.
        offset: where its bytes begin in the shard.
    """

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int

    @property
    def is_floating(self) -> bool:
        """Whether it holds floating-point numbers."""
        return "float" in self.dtype


class Checkpoint:
    """The tensors of a model folder by name.

    Args:
        folder: the model folder.

    Attributes:
        tensors: where each tensor lies.
        copies: those that `with_copies` has added, and the one that each reads.

    Raises:
        LlmoptError: a shard is missing, truncated, or its header contradicts itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self.copies: dict[str, str] = {}
        for shard in _shards(folder):
            self.tensors.update(read_header(shard))
            if len(self.tensors) > _MAX_TENSORS:
                raise _damaged(shard, f"with it the checkpoint has more than {_MAX_TENSORS} tensors")
        if not self.tensors:
            raise LlmoptError("the checkpoint holds no tensor", where=str(folder), hint=_FETCH_AGAIN)
        self._check_index()

    def __contains__(self, name: object) -> bool:
        """Return whether the checkpoint has a tensor of that name."""
        return name in self.tensors

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory of its own.

        Plain reads rather than the library's memory map: mapped pages of a shard count as this process's memory for as
        long as the map lives.

        Raises:
            LlmoptError: it holds NaN or Inf.
        """
        import torch

        info = self.tensors[name]
        data = torch.empty(info.nbytes, dtype=torch.uint8)
        with info.shard.open("rb", buffering=0) as stream:
            stream.seek(info.offset)
            _read_into(stream, data.numpy().data, info)
        tensor = data.view(getattr(torch, info.dtype)).reshape(info.shape)
        if info.is_floating and not _is_finite(tensor):
            bad = int((~torch.isfinite(tensor.float())).sum())
            raise LlmoptError(
                f"weight `{name}` holds NaN or Inf",
                where=f"{bad} of {tensor.numel()} values, in {info.shard.name}",
                hint=_FETCH_AGAIN,
            )
        return tensor

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """Yield a matrix, (count, columns) at a time, without holding it whole.

        Raises:
            LlmoptError: it holds NaN or Inf.
        """
        info = self.tensors[name]
        for piece in self.pieces(name, count * info.shape[1]):
            if info.is_floating and not _is_finite(piece):
                self.read(name)  # which says how many
            yield piece.view(-1, info.shape[1])

    def strips(self, name: str, strips: Iterable[slice]) -> Iterator[Tensor]:
        """Yield some rows of a matrix after the others; nothing is checked."""
        import torch

        info = self.tensors[name]
        row = info.nbytes // max(1, info.shape[0])
        with info.shard.open("rb", buffering=0) as stream:
            for strip in strips:
                data = torch.empty((strip.stop - strip.start) * row, dtype=torch.uint8)
                stream.seek(info.offset + strip.start * row)
                _read_into(stream, data.numpy().data, info)
                yield data.view(getattr(torch, info.dtype)).view(-1, info.shape[1])

    def pieces(self, name: str, length: int) -> Iterator[Tensor]:
        """Yield a tensor's elements in their order, (up to `length`,) at a time; nothing is checked."""
        import torch

        info = self.tensors[name]
        dtype = getattr(torch, info.dtype)
        with info.shard.open("rb", buffering=0) as stream:
            stream.seek(info.offset)
            for start in range(0, info.nbytes, length * dtype.itemsize):
                data = torch.empty(min(length * dtype.itemsize, info.nbytes - start), dtype=torch.uint8)
                _read_into(stream, data.numpy().data, info)
                yield data.view(dtype)

    def prefetch(self, names: Iterable[str]) -> None:
        """Tell the system that tensors will be read soon, so that the disk works while something is computed."""
        if not hasattr(os, "posix_fadvise"):  # neither macOS nor Windows has it
            return
        for name in names:
            info = self.tensors[name]
            with info.shard.open("rb", buffering=0) as stream:
                os.posix_fadvise(stream.fileno(), info.offset, info.nbytes, os.POSIX_FADV_WILLNEED)

    def with_copies(self, copies: Mapping[str, str]) -> Checkpoint:
        """Return the checkpoint with further tensors, each reading what another one holds.

        Args:
            copies: name of a new tensor -> name of the one that it begins as a copy of.
        """
        made = copy.copy(self)
        made.tensors = self.tensors | {name: self.tensors[source] for name, source in copies.items()}
        made.copies = self.copies | dict(copies)
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def files(self) -> list[Path]:
        """Config and shards."""
        return sorted({info.shard for info in self.tensors.values()} | {self.folder / "config.json"})

    def sha256(self, digest: Digest = file_sha256) -> str:
        """Return a hash over config and shards: names and bytes, in order of the names."""
        return files_sha256(((file.name, file) for file in self.files), digest)

    def _check_index(self) -> None:
        path = self.folder / INDEX
        if not path.is_file():
            return
        for name in _weight_map(path):
            if name not in self.tensors:
                raise LlmoptError(
                    f"weight `{name}` is missing",
                    where=f"{INDEX} lists it, but its shard does not hold it",
                    hint="the checkpoint is incomplete: fetch or save it again",
                )


def _read_into(stream: RawIOBase, buffer: memoryview, info: TensorInfo) -> None:
    """Fill `buffer`; one read of a raw file gives 2 GiB at most."""
    position = 0
    while position < len(buffer):
        count = stream.readinto(buffer[position:])
        if not count:
            raise _damaged(info.shard, "it became shorter while it was read")
        position += count


def _is_finite(tensor: Tensor) -> bool:
    """Return whether floating-point numbers hold neither NaN nor Inf."""
    import torch

    wide = tensor.float() if tensor.itemsize == 1 else tensor  # torch adds no 8 bits
    # The sum of a tensor tells far more cheaply than a test of each element; one that overflows falls to the test.
    return bool(torch.isfinite(wide.sum())) or bool(torch.isfinite(wide).all())


def _weight_map(path: Path) -> Mapping[str, str]:
    try:
        weight_map = read_json(path)["weight_map"]
    except (UnreadableError, KeyError, TypeError) as error:
        raise LlmoptError(f"{path.name} is damaged", where=f"{path}\n{error!r}", hint=_FETCH_AGAIN) from None
    if not isinstance(weight_map, dict):
        raise LlmoptError(f"{path.name} is damaged", where=f"{path}\n`weight_map` is no object", hint=_FETCH_AGAIN)
    for file in weight_map.values():
        if not is_plain_name(file):
            raise LlmoptError(
                f"{path.name} points outside its folder",
                where=f"shard name {str(file)[:200]!r}",
                hint="put all shards beside the index, and name them there without a path",
            )
    return weight_map


def _shards(folder: Path) -> list[Path]:
    check_links(folder, "*.safetensors", INDEX, "config.json")
    index = folder / INDEX
    if index.is_file():
        files = sorted(set(_weight_map(index).values()))
        check_links(folder, *map(escape, files))
    elif (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    for file in files:
        if not (folder / file).is_file():
            raise LlmoptError(
                f"shard {file} is missing",
                where=str(folder),
                hint="the checkpoint is incomplete: fetch or save it again",
            )
    return [folder / file for file in files]


def read_header(shard: Path) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file.

    Format: 8 bytes little-endian length n, n bytes of JSON `{name: {dtype, shape, data_offsets: [begin, end]}}`, data.

    Raises:
        LlmoptError: the file is truncated or its header contradicts itself or the file's size.
    """
    size = shard.stat().st_size
    with shard.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if length < 2 or length > MAX_JSON or 8 + length > size:
            said = f"says {length} bytes" if length >= 0 else "is cut short"
            raise _damaged(shard, f"its header {said}, the file has {size}")
        raw = stream.read(length)
    try:
        header = parse_json(raw, unique=True)
        entries = dict(_entries(header, shard, 8 + length))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(shard, f"its header cannot be read: {str(error)[:300]}") from None
    _check_offsets(header, entries, shard, size - 8 - length)
    return entries


def _entries(header: dict[str, Any], shard: Path, start: int) -> Iterator[tuple[str, TensorInfo]]:
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not name or not name.isprintable():
            raise ValueError(f"a tensor's name {name[:100]!r} cannot be shown")
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"`{name}` has the unknown dtype {entry['dtype']!r}")
        dtype, width = DTYPES[entry["dtype"]]
        shape = tuple(entry["shape"])
        if len(entry["data_offsets"]) != 2 or len(shape) > _MAX_DIMENSIONS:
            raise ValueError(f"`{name}` needs two offsets, and at most {_MAX_DIMENSIONS} dimensions")
        if not all(type(number) is int and 0 <= number < _MAX_NUMBER for number in (*shape, *entry["data_offsets"])):
            raise ValueError(f"`{name}` has a shape or offsets that are no sizes")
        yield name, TensorInfo(shard, dtype, shape, prod(shape) * width, start + entry["data_offsets"][0])


def _check_offsets(header: dict[str, Any], entries: dict[str, TensorInfo], shard: Path, data_bytes: int) -> None:
    position = 0
    for name, info in sorted(entries.items(), key=lambda item: tuple(header[item[0]]["data_offsets"])):
        begin, end = header[name]["data_offsets"]
        if begin != position:
            raise _damaged(
                shard, f"`{name}` begins at byte {begin} of the data, the tensor before it ends at {position}"
            )
        if end - begin != info.nbytes:
            raise _damaged(
                shard,
                f"`{name}` {list(info.shape)} {info.dtype} takes {info.nbytes} bytes, its offsets say {end - begin}",
            )
        position = end
    if position != data_bytes:
        raise _damaged(shard, f"its tensors take {position} bytes, the file holds {data_bytes}")


def _damaged(shard: Path, why: str) -> LlmoptError:
    return LlmoptError(f"{shard.name} is damaged", where=f"{shard}\n{why}", hint=_FETCH_AGAIN)
