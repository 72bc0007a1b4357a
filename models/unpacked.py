"""An artifact of ours, its weights unpacked by the library that its readers use.

For a model too large to be opened whole: the unpacking is compressed-tensors', only the order is ours, a few rows of
one weight after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import LlmoptError
from .checkpoint import Checkpoint
from .handle import TorchModel
from .locate import read_config
from .store import IN_CACHE

_PACKED, _SCALE, _ZERO, _SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
_PARTS = ("weight", _PACKED, _SCALE, _ZERO, _SHAPE, "weight_global_scale")
_WORD = 32
"""Zero points are packed along the rows, so rows are unpacked in multiples of the codes' words."""


class UnpackedFolder:
    """A folder of plain or packed tensors by their names before packing.

    Raises:
        LlmoptError: its config.json and tensors do not fit together.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._checkpoint = Checkpoint(directory)
        self._schemes = _schemes(read_config(directory))

    def read(self, name: str) -> Tensor:
        """Return a tensor in the dtype that its readers give it.

        Raises:
            LlmoptError: it is not there.
        """
        layer = name.removesuffix(".weight")
        if self.is_packed(layer):
            return torch.cat([part for _, part in self.rows(layer)])
        if name not in self._checkpoint:
            raise LlmoptError(f"weight `{name}` is missing from the artifact", where=str(self._directory))
        return self._checkpoint.read(name)

    def names(self) -> list[str]:
        """Return the names of all tensors that `read` gives; the parts of a packed weight count as that weight."""
        found: dict[str, None] = {}
        for name in self._checkpoint.tensors:
            layer, _, part = name.rpartition(".")
            found[f"{layer}.weight" if part in _PARTS and self.is_packed(layer) else name] = None
        return list(found)

    def beside(self, name: str, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield parts of `tensor`, and of the one of that name, so that only one of the two is in memory whole."""
        parts = tensor.reshape(-1).split(IN_CACHE)
        found = self._checkpoint.tensors.get(name)
        if found is None or found.shape != tuple(tensor.shape):
            yield tensor, torch.empty(0)
        else:
            yield from zip(parts, self._checkpoint.pieces(name, IN_CACHE), strict=True)

    def is_packed(self, layer: str) -> bool:
        """Return whether a layer's weight is stored as codes."""
        return f"{layer}.{_SCALE}" in self._checkpoint

    def rows(self, layer: str) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of a packed layer's weight, (rows, in_features), one after the other; some formats come whole."""
        from compressed_tensors.compressors import BaseCompressor

        parts = {
            part: self._checkpoint.read(f"{layer}.{part}") for part in _PARTS if f"{layer}.{part}" in self._checkpoint
        }
        scheme = self._schemes.get(layer) or self._schemes["Linear"]
        reader: Any = BaseCompressor.get_value_from_registry(scheme.format)
        if _SHAPE not in parts or len(parts[_SCALE]) != parts[_SHAPE][0]:
            whole: Tensor = reader.decompress(parts, scheme)["weight"]
            yield slice(0, len(whole)), whole
            return
        out_features, in_features = parts[_SHAPE].tolist()
        step = max(1, IN_CACHE // in_features // _WORD) * _WORD
        for start in range(0, out_features, step):
            rows = slice(start, min(start + step, out_features))
            some = _rows_of(parts, rows, bits=scheme.weights.num_bits)
            yield rows, reader.decompress(some, scheme)["weight"]


def same_weights(model: TorchModel, directory: Path) -> bool:
    """Return whether every weight that readers get from a folder is that of `model`, bit for bit."""
    folder = UnpackedFolder(directory)
    for name in model.checkpoint.tensors:
        layer = name.removesuffix(".weight")
        if layer in model.quantized and folder.is_packed(layer):
            weight = model.quantized_weight(layer)
            pairs = ((weight.rows(rows.start, rows.stop).dequantize(), part) for rows, part in folder.rows(layer))
        else:
            pairs = folder.beside(name, model.read(name))
        if not all(_same_bits(ours, theirs) for ours, theirs in pairs):
            return False
    return True


def _same_bits(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors hold the same bits; in words of 8 bytes, which torch compares six times as fast."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    word = torch.uint8 if first.nbytes % 8 else torch.int64
    first, second = (one.contiguous().reshape(-1).view(torch.uint8).view(word) for one in (first, second))
    return first.equal(second)


def _rows_of(parts: dict[str, Tensor], rows: slice, *, bits: int) -> dict[str, Tensor]:
    """Return what is stored of some rows of a weight, the first a multiple of `_WORD`."""
    some = {
        _PACKED: parts[_PACKED][rows],
        _SCALE: parts[_SCALE][rows],
        _SHAPE: torch.tensor([rows.stop - rows.start, int(parts[_SHAPE][1])]),
    }
    if _ZERO in parts:
        some[_ZERO] = parts[_ZERO][rows.start * bits // _WORD : -(-rows.stop * bits // _WORD)]
    return some


def _schemes(config: dict[str, Any]) -> dict[str, Any]:
    """Return the scheme of each target (a layer's name, or "Linear") as compressed-tensors reads it."""
    from compressed_tensors.quantization import QuantizationScheme

    quantization = config.get("quantization_config") or {}
    groups = quantization.get("config_groups", {})
    return {
        target: QuantizationScheme(**{"format": quantization["format"]} | group)
        for group in groups.values()
        for target in group["targets"]
    }
