"""What a pass made of a model, as plain data beside the files that hold its weights: the way back to its handle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..core.activations import QuantizedCache, QuantizedInput
from ..core.adapter import Adapter
from ..core.facts import ModelFacts
from .checkpoint import Checkpoint
from .store import StoredFile, WorkStore

if TYPE_CHECKING:
    from .handle import TorchModel


class SavedModel(msgspec.Struct, frozen=True, kw_only=True):
    """How a model differs from the one that a pass was given.

    Attributes:
        facts: its outline; `source` is left empty, since the same bytes may lie elsewhere.
        folder: where the pass wrote a new checkpoint, below its own folder; None where the checkpoint is the same.
        copies: tensors of the checkpoint that read what another one holds.
        dtype: the dtype that floating-point tensors are cast to.
        untied: whether the head has a weight of its own although the source's config.json ties it.
        files: what the pass wrote of weights, in order, below its own folder.
        inputs: all layers whose inputs are rounded, and how.
        caches: all attention modules whose keys and values are rounded, and how.
        sparse: all layers whose zeros stay.
        adapter: what lies beside the weights, its file below the pass's own folder.
    """

    facts: ModelFacts
    folder: str | None
    copies: dict[str, str]
    dtype: str | None
    untied: bool
    files: tuple[StoredFile, ...]
    inputs: dict[str, QuantizedInput]
    caches: dict[str, QuantizedCache]
    sparse: tuple[str, ...]
    adapter: Adapter | None = None

    def paths(self, place: Path) -> list[Path]:
        """Return the files that are needed to go on from this model, below the pass's folder `place`."""
        rewritten = [] if self.folder is None else [one for one in (place / self.folder).iterdir() if one.is_file()]
        adapter = [] if self.adapter is None else [place / self.adapter.file]
        return [*rewritten, *(place / one.path for one in self.files), *adapter]


def save(before: TorchModel, after: TorchModel, place: Path) -> SavedModel:
    """Return what a pass made of a model.

    Args:
        before: the model that the pass was given, whose store wrote to `place`.
        after: the one that it returned.
        place: the folder that the pass wrote to.
    """
    moved = after.location.folder != before.location.folder
    return SavedModel(
        facts=msgspec.structs.replace(after.facts, source=""),
        folder=after.location.folder.relative_to(place).as_posix() if moved else None,
        copies=after.checkpoint.copies,
        dtype=after.dtype,
        untied=after.untied,
        files=tuple(relative(one, place) for one in after.store.files),
        inputs=dict(after.store.inputs),
        caches=dict(after.store.caches),
        sparse=tuple(sorted(after.store.sparse)),
        adapter=None if after.adapter is None else _moved(after.adapter, Path(after.adapter.file).relative_to(place)),
    )


def restore(before: TorchModel, saved: SavedModel, place: Path) -> TorchModel:
    """Return the model that a pass made.

    Args:
        before: the model that the pass was given.
        saved: what `save` returned.
        place: where the folder that the pass wrote to lies now.

    Raises:
        LlmoptError: a file is damaged.
    """
    if saved.folder is None:
        location, checkpoint, store = before.location, before.checkpoint, before.store.at(place)
    else:
        location = replace(before.location, folder=place / saved.folder)
        checkpoint, store = Checkpoint(location.folder), WorkStore(place)
    added: Mapping[str, str] = {new: old for new, old in saved.copies.items() if new not in checkpoint.tensors}
    for file in saved.files:
        store.add(msgspec.structs.replace(file, path=str(place / file.path)))
    store.inputs, store.caches, store.sparse = dict(saved.inputs), dict(saved.caches), set(saved.sparse)
    return replace(
        before,
        location=location,
        checkpoint=checkpoint.with_copies(added) if added else checkpoint,
        facts=msgspec.structs.replace(saved.facts, source=before.facts.source),
        store=store,
        dtype=saved.dtype,
        untied=saved.untied,
        adapter=None if saved.adapter is None else _moved(saved.adapter, place / saved.adapter.file),
    )


def _moved(adapter: Adapter, file: Path) -> Adapter:
    return msgspec.structs.replace(adapter, file=file.as_posix())


def relative(file: StoredFile, place: Path) -> StoredFile:
    """Return a file of the store with its path below `place`."""
    return msgspec.structs.replace(file, path=Path(file.path).relative_to(place).as_posix())
