"""Writing safetensors shards one tensor at a time.

The library's own writer takes a dict of all tensors; a model does not fit. The format is simple: 8 bytes of header
length, a JSON header, the tensors. Their sizes are known beforehand, so the header is written first and each tensor
goes to its place when it comes. Within a shard tensors lie as the library orders them: widest dtype first, then by
name.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

if TYPE_CHECKING:
    from torch import Tensor

_WIDTHS = {
    "I64": 8,
    "F64": 8,
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of an element; dtypes in the order in which the library puts tensors into a shard."""

_RANKS = {code: rank for rank, code in enumerate(_WIDTHS)}
_CODES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to come: torch's name of its dtype ("torch.int32") and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def code(self) -> str:
        """Safetensors' name of the dtype."""
        return _CODES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return prod(self.shape) * _WIDTHS[self.code]


class ShardWriter:
    """Writes `model.safetensors`, or numbered shards and their index, as Hugging Face names them.

    Args:
        directory: where to write.
        specs: every tensor that will be written, in the order in which they are divided among shards.
        max_shard_bytes: a shard is closed before it would exceed this.
    """

    def __init__(self, directory: Path, specs: Mapping[str, TensorSpec], *, max_shard_bytes: int = 5 * 10**9) -> None:
        self._specs = specs
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._files: list[BinaryIO] = []
        self._directory = directory
        shards = _divide(specs, max_shard_bytes)
        count = len(shards)
        self._names = (
            ["model.safetensors"]
            if count == 1
            else [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]
        )
        for name, shard in zip(self._names, shards, strict=True):
            self._open(directory / name, shard)
        if count > 1:
            self._write_index(shards)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor into its place.

        Raises:
            KeyError: it was not announced, or was written already.
            ValueError: it is not of the announced dtype and shape.
        """
        import torch

        spec = self._specs[name]
        if (str(tensor.dtype), tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise ValueError(f"{name}: announced {spec}, got {tensor.dtype} {tuple(tensor.shape)}")
        stream, offset = self._places.pop(name)
        stream.seek(offset)
        flat = tensor.detach().contiguous().reshape(-1)
        stream.write(flat.view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files; a tensor that never came is a defect of the caller."""
        for stream in self._files:
            stream.close()
        if kind is None and self._places:
            raise ValueError(f"never written: {', '.join(sorted(self._places)[:5])}")

    def _open(self, path: Path, names: list[str]) -> None:
        ordered = sorted(names, key=lambda name: (_RANKS[self._specs[name].code], name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in ordered:
            spec = self._specs[name]
            offsets = [position, position + spec.nbytes]
            header[name] = {"dtype": spec.code, "shape": list(spec.shape), "data_offsets": offsets}
            position = offsets[1]
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        stream = path.open("wb")
        self._files.append(stream)
        stream.write(struct.pack("<Q", len(text)) + text)
        start = 8 + len(text)
        stream.truncate(start + position)
        for name in ordered:
            self._places[name] = (stream, start + header[name]["data_offsets"][0])  # type: ignore[index]

    def _write_index(self, shards: list[list[str]]) -> None:
        weight_map = {name: file for file, shard in zip(self._names, shards, strict=True) for name in shard}
        total = sum(spec.nbytes for spec in self._specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        path = self._directory / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _divide(specs: Mapping[str, TensorSpec], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards
