"""What the passes have made, on disk, in llmopt's own terms, so that memory holds one block and not the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.activations import QuantizedCache, QuantizedInput
from ..core.model import Linear
from ..core.quantized import Grid, QuantizedWeight

IN_CACHE = 1 << 19
"""So many weights at a time stay in the processor's cache from one step to the next."""

SHARD_BYTES = 1 << 28
"""A shard of a checkpoint in the work folder; a larger tensor has one of its own."""


def dequantize_into(place: Tensor, weight: QuantizedWeight) -> None:
    """Write the dequantized weight to `place`, (out_features, in_features), a few rows at a time.

    What stays in the processor's cache is several times as fast, and nothing else is allocated.
    """
    out_features, in_features = weight.shape
    height = weight.grid.group_height(out_features) if weight.grid.group_size == "block" else 1
    rows = max(1, IN_CACHE // in_features // height) * height
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        place[start:stop] = weight.rows(start, stop).dequantize()


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a checkpoint shard by shard; no more than a shard is in memory.

    Args:
        folder: where to write.
        tensors: by name, in the order in which they are divided among shards.
    """
    shard: dict[str, Tensor] = {}
    count = 0

    def close() -> None:
        nonlocal count
        count += 1
        save_file(shard, folder / f"model-{count:05d}.safetensors")
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > SHARD_BYTES:
            close()
        shard[name] = tensor.clone() if tensor.nbytes < tensor.untyped_storage().nbytes() else tensor.contiguous()
    close()


class WorkStore:
    """Quantized layers by name.

    Args:
        folder: where to keep them; created.

    Attributes:
        folder: where they are kept.
        grids: the grid of each layer.
        packed: how many weights each layer has, and their bytes, codes packed without gaps.
        changed: floating-point checkpoint tensors that are different now, and the file of each.
        transposed: the layers that the checkpoint stores as (in, out); a square matrix does not tell.
        inputs: the layers whose inputs are rounded, and how.
        sparse: the layers whose zeros later passes leave zeros.
        caches: the attention modules whose keys and values are rounded, by module path, and how.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._files: dict[str, Path] = {}
        self.grids: dict[str, Grid] = {}
        self.packed: dict[str, tuple[int, int]] = {}
        self.changed: dict[str, Path] = {}
        self._files_written = 0
        self.transposed: set[str] = set()
        self.inputs: dict[str, QuantizedInput] = {}
        self.caches: dict[str, QuantizedCache] = {}
        self.sparse: set[str] = set()

    def put(
        self,
        block: str,
        results: Mapping[Linear, QuantizedWeight],
        *,
        transposed: Collection[Linear] = (),
        changed: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write what the passes of one sweep made of one block.

        Args:
            block: its name.
            results: quantized layers.
            transposed: the layers that the checkpoint stores as (in, out).
            changed: floating-point checkpoint tensors that are different now.
        """
        self._files_written += 1
        path = self.folder / f"{self._files_written:06d}-{block}.safetensors"
        tensors: dict[str, Tensor] = dict(changed or {})
        self.changed.update(dict.fromkeys(tensors, path))
        for linear, weight in results.items():
            tensors[f"{linear.name}.codes"] = weight.codes.contiguous()
            tensors[f"{linear.name}.scale"] = weight.scale.contiguous()
            if weight.zero_point is not None:
                tensors[f"{linear.name}.zero_point"] = weight.zero_point.contiguous()
            if weight.divisor is not None:
                tensors[f"{linear.name}.divisor"] = weight.divisor.clone()  # layers of one product share it
            self._files[linear.name] = path
            self.grids[linear.name] = weight.grid
            self.packed[linear.name] = (weight.codes.numel(), weight.nbytes)
            if linear in transposed:
                self.transposed.add(linear.name)
        if tensors:
            save_file(tensors, path)

    def get_changed(self, name: str) -> Tensor:
        """Read a floating-point tensor that a pass has changed."""
        with safe_open(self.changed[name], framework="pt") as file:
            return file.get_tensor(name)

    def get(self, name: str) -> QuantizedWeight:
        """Read one layer."""
        grid = self.grids[name]
        with safe_open(self._files[name], framework="pt") as file:
            return QuantizedWeight(
                codes=file.get_tensor(f"{name}.codes"),
                scale=file.get_tensor(f"{name}.scale"),
                zero_point=None if grid.symmetric else file.get_tensor(f"{name}.zero_point"),
                grid=grid,
                divisor=file.get_tensor(f"{name}.divisor") if grid.number == "nvfp4" else None,
            )
