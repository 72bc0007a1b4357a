"""What the passes have made, on disk, in llmopt's own terms, so that memory holds one block and not the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import msgspec
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.activations import QuantizedCache, QuantizedInput
from ..core.adapter import names
from ..core.block import Linear
from ..core.errors import is_disk_full
from ..core.quantized import Grid, QuantizedWeight

IN_CACHE = 1 << 19
"""So many weights at a time stay in the processor's cache from one step to the next."""

SHARD_BYTES = 1 << 28
"""A shard of a checkpoint in the work folder; a larger tensor has one of its own."""


def dequantized_rows(weight: QuantizedWeight) -> Iterator[tuple[slice, Tensor]]:
    """Yield which rows, and the dequantized weight of these, a few at a time.

    What stays in the processor's cache is several times as fast, and nothing else is allocated.
    """
    out_features, in_features = weight.shape
    height = weight.grid.group_height(out_features) if weight.grid.group_size == "block" else 1
    count = max(1, IN_CACHE // in_features // height) * height
    for start in range(0, out_features, count):
        rows = slice(start, min(start + count, out_features))
        yield rows, weight.rows(rows.start, rows.stop).dequantize()


def dequantize_into(place: Tensor, weight: QuantizedWeight) -> None:
    """Write the dequantized weight to `place`, (out_features, in_features)."""
    for rows, part in dequantized_rows(weight):
        place[rows] = part


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


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """What one file of the store holds.

    Attributes:
        path: the file.
        layers: the quantized layers in it, and the grid of each.
        transposed: those of them that the checkpoint stores as (in, out).
        changed: the floating-point checkpoint tensors in it.
        packed: how many weights each of the layers has, and their bytes, codes packed without gaps.
        adapted: modules, by path, of which it holds what an adapter adds.
    """

    path: str
    layers: dict[str, Grid]
    packed: dict[str, tuple[int, int]]
    transposed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()


class WorkStore:
    """Quantized layers by name.

    Args:
        folder: where to write them; created.

    Attributes:
        folder: where they are written.
        spare: where they are written once the disk of `folder` is full; None where that is an error.
        files: what was written there, in order.
        grids: the grid of each layer.
        packed: how many weights each layer has, and their bytes, codes packed without gaps.
        changed: floating-point checkpoint tensors that are different now, and the file of each.
        transposed: the layers that the checkpoint stores as (in, out); a square matrix does not tell.
        inputs: the layers whose inputs are rounded, and how.
        sparse: the layers whose zeros later passes leave zeros.
        caches: the attention modules whose keys and values are rounded, by module path, and how.
        adapted: modules that an adapter adds to, by path, and the file of each.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.spare: Path | None = None
        self.files: list[StoredFile] = []
        self._puts = 0
        self._files: dict[str, Path] = {}
        self.grids: dict[str, Grid] = {}
        self.packed: dict[str, tuple[int, int]] = {}
        self.changed: dict[str, Path] = {}
        self.transposed: set[str] = set()
        self.inputs: dict[str, QuantizedInput] = {}
        self.caches: dict[str, QuantizedCache] = {}
        self.sparse: set[str] = set()
        self.adapted: dict[str, Path] = {}

    def at(self, folder: Path) -> WorkStore:
        """Return a store that knows all this one does and writes to another folder; this one stays as it is."""
        made = WorkStore(folder)
        made._files, made.grids, made.changed = dict(self._files), dict(self.grids), dict(self.changed)
        made.packed = dict(self.packed)
        made.transposed, made.sparse = set(self.transposed), set(self.sparse)
        made.inputs, made.caches = dict(self.inputs), dict(self.caches)
        made.adapted = dict(self.adapted)
        return made

    def put(
        self,
        block: str,
        results: Mapping[Linear, QuantizedWeight],
        *,
        transposed: Collection[Linear] = (),
        changed: Mapping[str, Tensor] | None = None,
        factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> StoredFile | None:
        """Write what the passes of one sweep made of one block.

        Args:
            block: its name.
            results: quantized layers.
            transposed: the layers that the checkpoint stores as (in, out).
            changed: floating-point checkpoint tensors that are different now.
            factors: what an adapter adds, `down` and `up` by the path of a module.

        Returns:
            What was written, None when there was nothing to write.
        """
        self._puts += 1
        path = self.folder / f"{self._puts:06d}-{block}.safetensors"
        tensors: dict[str, Tensor] = dict(changed or {})
        for linear, weight in results.items():
            tensors[f"{linear.name}.codes"] = weight.codes.contiguous()
            tensors[f"{linear.name}.scale"] = weight.scale.contiguous()
            if weight.zero_point is not None:
                tensors[f"{linear.name}.zero_point"] = weight.zero_point.contiguous()
            if weight.divisor is not None:
                tensors[f"{linear.name}.divisor"] = weight.divisor.clone()  # layers of one product share it
        for module, pair in (factors or {}).items():
            tensors |= dict(zip(names(module), pair, strict=True))
        if not tensors:
            return None
        file = StoredFile(
            path=str(self._save(tensors, path)),
            layers={linear.name: weight.grid for linear, weight in results.items()},
            transposed=tuple(linear.name for linear in results if linear in transposed),
            changed=tuple(changed or ()),
            packed={linear.name: (weight.codes.numel(), weight.nbytes) for linear, weight in results.items()},
            adapted=tuple(factors or ()),
        )
        self.add(file)
        return file

    def _save(self, tensors: dict[str, Tensor], path: Path) -> Path:
        """Write a file, in `spare` where the disk of `folder` is full, and return where it lies."""
        try:
            save_file(tensors, path)
        except Exception as error:
            if self.spare is None or not is_disk_full(error):
                raise
            path.unlink(missing_ok=True)
            self.folder, self.spare = self.spare, None
            self.folder.mkdir(parents=True, exist_ok=True)
            return self._save(tensors, self.folder / path.name)
        return path

    def skip(self, count: int) -> None:
        """Number the next file as if `count` blocks had been put before it."""
        self._puts += count

    def add(self, file: StoredFile) -> None:
        """Take up a file that is there already."""
        path = Path(file.path)
        self.files.append(file)
        self.changed.update(dict.fromkeys(file.changed, path))
        self._files.update(dict.fromkeys(file.layers, path))
        self.grids.update(file.layers)
        self.packed.update(file.packed)
        self.transposed.update(file.transposed)
        self.adapted.update(dict.fromkeys(file.adapted, path))

    def get_changed(self, name: str) -> Tensor:
        """Read a floating-point tensor that a pass has changed."""
        with safe_open(self.changed[name], framework="pt") as file:
            return file.get_tensor(name)

    def get_factors(self, module: str) -> tuple[Tensor, Tensor]:
        """Read what an adapter adds to a module: `down` and `up`."""
        with safe_open(self.adapted[module], framework="pt") as file:
            down, up = (file.get_tensor(name) for name in names(module))
        return down, up

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
