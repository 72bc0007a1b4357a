"""A model on its way through the pipeline: a checkpoint, what the passes changed of it, and nothing in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..core.activations import QuantizedCache, QuantizedInput
from ..core.adapter import Adapter, names
from ..core.block import Linear
from ..core.errors import LlmoptError, UsageError
from ..core.facts import ModelFacts
from ..core.model import Channels, Rotation, RotationReport, WidthKind
from ..core.progress import Reporter
from ..core.quantized import Grid, QuantizedWeight
from .checkpoint import Checkpoint
from .locate import Location
from .outline import outline
from .side_files import copy_side_files
from .skeleton import Skeleton, own_experts_choice
from .store import WorkStore, dequantize_into, write_shards


@dataclass(frozen=True, slots=True)
class TorchModel:
    """A transformers model; the implementation of `core.exports.ExportableModel`.

    Attributes:
        location: its folder.
        checkpoint: its tensors as they were.
        facts: its outline as the passes left it.
        store: the layers that passes have quantized.
        dtype: the dtype floating-point tensors are cast to; None leaves each as it is.
        untied: whether the head has a weight of its own although config.json of the source ties it.
        adapter: what layers add to their outputs, kept beside the weights.
    """

    location: Location
    checkpoint: Checkpoint
    facts: ModelFacts
    store: WorkStore
    dtype: str | None = None
    untied: bool = False
    adapter: Adapter | None = None

    @classmethod
    def create(cls, location: Location, checkpoint: Checkpoint, facts: ModelFacts, work: Path) -> TorchModel:
        """Return the unchanged model; `work` is a folder for what the passes make."""
        return cls(location, checkpoint, facts, WorkStore(work))

    @property
    def quantized(self) -> Mapping[str, Grid]:
        """The quantized layers by checkpoint name, and the grid of each."""
        return self.store.grids

    @property
    def inputs(self) -> Mapping[str, QuantizedInput]:
        """The layers whose inputs are rounded, by checkpoint name, and how."""
        return self.store.inputs

    @property
    def caches(self) -> Mapping[str, QuantizedCache]:
        """The attention modules whose keys and values are rounded, by module path, and how."""
        return self.store.caches

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as the passes left them, codes packed without gaps."""
        width = getattr(torch, self.facts.dtype).itemsize
        floating = sum(getattr(torch, dtype).itemsize * prod(shape) for dtype, shape in self.tensor_specs().values())
        return floating + sum(packed - weights * width for weights, packed in self.store.packed.values())

    def quantized_weight(self, name: str) -> QuantizedWeight:
        """Read one quantized layer from disk."""
        return self.store.get(name)

    def cast(self, dtype: str) -> TorchModel:
        """Return the model with all floating-point weights stored in `dtype`."""
        return replace(self, dtype=dtype, facts=msgspec.structs.replace(self.facts, dtype=dtype))

    def untie(self) -> tuple[TorchModel, tuple[str, ...]]:
        """Return the model with every tied parameter stored under its own name, and the names of the new tensors."""
        copies = self.skeleton().untied_copies()
        for name, source in copies.items():
            if source in self.store.changed:
                self.store.put(name, {}, changed={name: self.read(source)})
        checkpoint = self.checkpoint.with_copies(copies)
        added = checkpoint.nbytes - self.checkpoint.nbytes
        weights = sum(prod(checkpoint.tensors[name].shape) for name in copies)
        facts = msgspec.structs.replace(
            self.facts,
            config={**self.facts.config, "tie_word_embeddings": False},
            parameters=self.facts.parameters + weights,
            bytes=self.facts.bytes + added,
            outside_bytes=self.facts.outside_bytes + added,
        )
        return replace(self, checkpoint=checkpoint, facts=facts, untied=True), tuple(copies)

    def rotate(
        self,
        residual: Callable[[int], Rotation] | None,
        values: Callable[[int], Rotation] | None,
        *,
        seed: int,
        reporter: Reporter,
    ) -> tuple[TorchModel, RotationReport]:
        """Return the model computing the same in rotated channels; see `core.model.ModelHandle`."""
        from .rotation import rotate

        return rotate(self, residual, values, seed=seed, reporter=reporter)

    def blocks(self) -> list[list[str]]:
        """Return the blocks of every stack; see `core.model.ModelHandle`."""
        return [[site.name for site in stack] for stack in self.skeleton().stacks]

    def without_blocks(self, dropped: Collection[str], *, seed: int) -> TorchModel:
        """Return the model without some of its blocks; see `core.model.ModelHandle`."""
        from .depth import without_blocks

        return without_blocks(self, dropped, seed=seed)

    def channels(
        self, kinds: Sequence[WidthKind], *, seed: int, keep: Callable[[WidthKind, int], int] | None = None
    ) -> Channels:
        """Return the units that the model may lose; see `core.model.ModelHandle`."""
        from .width import channels

        return channels(self, kinds, seed=seed, keep=keep)

    @property
    def folder(self) -> Path:
        """Where the files beside the weights lie."""
        return self.location.folder

    @property
    def vocabulary_size(self) -> int:
        """How many tokens the embeddings have."""
        return int(self.skeleton().config.get_text_config().vocab_size)

    def with_vocabulary(
        self, kept: Sequence[int], config: Mapping[str, Any], *, side_files: Callable[[Path], None], seed: int
    ) -> TorchModel:
        """Return the model with fewer tokens; see `core.model.ModelHandle`."""
        from .smaller_vocabulary import with_vocabulary

        return with_vocabulary(self, kept, config, side_files=side_files, seed=seed)

    def loss_without(self, dropped: Collection[str], rows: Sequence[Sequence[int]], *, tokens: int = 2048) -> float:
        """Return the loss of the model with some blocks left out; see `core.model.ModelHandle`."""
        from .depth import loss_without

        return loss_without(self, dropped, rows, tokens)

    def rewritten(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        config: Mapping[str, Any],
        *,
        side_files: Callable[[Path], None] | None = None,
    ) -> TorchModel:
        """Return a model of another shape; see `core.model.ModelHandle`."""
        folder = self.store.folder / "rewritten"
        folder.mkdir()
        write_shards(folder, tensors)
        self._write_config(folder, config)
        copy_side_files(self.location.folder, folder, with_code=self.location.trust_remote_code)
        if side_files is not None:
            side_files(folder)
        location, checkpoint = replace(self.location, folder=folder), Checkpoint(folder)
        made = TorchModel.create(location, checkpoint, outline(location, checkpoint), folder / "work")
        made.store.sparse |= self.store.sparse
        return made

    def stored_dtype(self, name: str) -> str:
        """Return the dtype that checkpoint tensor `name` will be stored in."""
        info = self.checkpoint.tensors[name]
        return self.dtype if self.dtype is not None and info.is_floating else info.dtype

    def read(self, name: str) -> Tensor:
        """Return a checkpoint tensor as the passes left it, quantized layers dequantized.

        Raises:
            LlmoptError: it holds NaN or Inf, or a value that its new dtype cannot hold.
        """
        layer = name.removesuffix(".weight")
        if layer in self.store.grids:
            return self._stored(layer)
        raw = self.store.get_changed(name) if name in self.store.changed else self.checkpoint.read(name)
        tensor = self._cast(name, raw)
        experts = [f"{layer}.{index}" for index in range(tensor.shape[0])] if tensor.ndim == 3 else []
        for index, expert in enumerate(experts):
            if expert in self.store.grids:
                tensor[index] = self._stored(expert)
            elif f"{expert}.weight" in self.store.changed:
                tensor[index] = self._cast(name, self.store.get_changed(f"{expert}.weight"))
        return tensor

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """Yield a checkpoint matrix as `read` returns it, (count, columns) at a time, not whole in memory if untouched.

        Raises:
            LlmoptError: as for `read`.
        """
        if self._touched(name):
            yield from self.read(name).split(count)
        else:
            yield from self.checkpoint.rows(name, count)

    def strips(self, name: str, strips: Sequence[slice]) -> Iterator[Tensor]:
        """Yield some rows of a checkpoint matrix as `read` returns it, not whole in memory if it is untouched."""
        if self._touched(name):
            whole = self.read(name)
            yield from (whole[strip] for strip in strips)
        else:
            yield from self.checkpoint.strips(name, strips)

    def _touched(self, name: str) -> bool:
        touched = name in self.store.changed or name.removesuffix(".weight") in self.store.grids
        return touched or self.stored_dtype(name) != self.checkpoint.tensors[name].dtype

    def widened(self, name: str) -> Tensor:
        """Return what `read` does, but a quantized layer in float32: for those that compute with it."""
        layer = name.removesuffix(".weight")
        return self._stored(layer, torch.float32) if layer in self.store.grids else self.read(name)

    def tensors(self) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        """Yield every weight once, in the checkpoint's order."""
        for name in self.checkpoint.tensors:
            layer = name.removesuffix(".weight")
            yield (layer, self.store.get(layer)) if layer in self.store.grids else (name, self.read(name))

    def tensor_specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of every checkpoint tensor as it will be stored in floating point."""
        return {name: (self.stored_dtype(name), info.shape) for name, info in self.checkpoint.tensors.items()}

    def linear_modules(self) -> dict[str, str | None]:
        """Return the model's linear modules: module path to checkpoint name, None for one tied to another tensor.

        Matrices of the blocks that sit in no Linear module (a router) are listed under their checkpoint names: other
        engines build them as linear layers.
        """
        skeleton = self.skeleton()
        found: dict[str, str | None] = {}
        for path, module in skeleton.model.named_modules():
            if isinstance(module, nn.Linear):
                binding = skeleton.naming.of_target.get(f"{path}.weight")
                found[path] = binding.sources[0][0].removesuffix(".weight") if binding else None
        for name in skeleton.naming.sources_of(name for site in skeleton.sites for name in site.parameters):
            if name.endswith(".weight") and len(self.checkpoint.tensors[name].shape) == 2:
                layer = name.removesuffix(".weight")
                if layer not in found.values():
                    found.setdefault(layer, layer)
        return found

    def skeleton(self) -> Skeleton:
        """Return the module tree without weights, its buffers loaded."""
        skeleton = Skeleton(self.location, self.checkpoint, untied=self.untied)
        skeleton.inputs.update(self.inputs)
        skeleton.caches.update(self.caches)
        _load_buffers(skeleton, self.read)
        return skeleton

    def materialize(self, dtype: str = "float32") -> PreTrainedModel:
        """Return the whole model in memory, in eval mode; its activations are not rounded."""
        skeleton = self.skeleton()
        skeleton.load([name for name, _ in skeleton.model.named_parameters()], self.read)
        own_experts_choice(skeleton.model)
        skeleton.compute_plainly()
        return skeleton.model.to(getattr(torch, dtype))

    def quantized_parameters(self) -> dict[str, str]:
        """Return the quantized layers by parameter; see `core.model.ModelHandle`."""
        naming = self.skeleton().naming
        found: dict[str, str] = {}
        for layer in self.quantized:
            target = next((name for name, b in naming.of_target.items() if b.sources[0][0] == f"{layer}.weight"), None)
            if target is None or naming.of_target[target].converter is not None:
                raise UsageError(
                    f"`{layer}` is only a part of one of the model's parameters",
                    where=f"architecture {self.facts.architecture}",
                    hint="let the model learn before the pass that rounds",
                )
            found[target] = layer
        return found

    @property
    def sparse(self) -> Collection[str]:
        """The layers whose zeros must stay zeros, by checkpoint name."""
        return self.store.sparse

    def sparse_parameters(self) -> list[str]:
        """Return the parameters that hold a sparse layer; see `core.model.ModelHandle`."""
        sources = {f"{layer}.weight" for layer in self.sparse}
        bindings = self.skeleton().naming.of_target.items() if sources else ()
        return [target for target, binding in bindings if any(name in sources for name, _ in binding.sources)]

    def stored_transposed(self, name: str) -> bool:
        """Return whether the checkpoint holds quantized layer `name` as (in, out)."""
        return name in self.store.transposed

    def with_parameters(
        self, read: Callable[[str], Tensor | None], *, quantized: Callable[[str], QuantizedWeight] | None = None
    ) -> TorchModel:
        """Return the model with other values in its parameters; see `core.model.ModelHandle`."""
        made = self.rewritten(self._checkpoint_of(read), {})
        if quantized is None:
            return made
        for layer in self.quantized:
            weight = quantized(layer)
            linear = Linear(layer, *weight.shape)
            turned = {linear} if self.stored_transposed(layer) else set[Linear]()
            made.store.put(layer, {linear: weight}, transposed=turned)
        return made

    def with_adapter(self, factors: Mapping[str, tuple[Tensor, Tensor]], *, alpha: int) -> TorchModel:
        """Return the model with a LoRA adapter beside its weights; see `core.model.ModelHandle`."""
        modules = dict(self.skeleton().model.named_modules())
        other = next((path for path in factors if not isinstance(modules[path], nn.Linear | Conv1D)), None)
        if other is not None:
            raise UsageError(
                f"`{other}` takes no adapter that could be kept beside the weights",
                where=f"it is no linear layer, but a {type(modules[other]).__name__}",
                hint="name linear layers with `lora_targets`",
            )
        path = self.store.folder / "adapter.safetensors"
        tensors = {name: one for layer, pair in factors.items() for name, one in zip(names(layer), pair, strict=True)}
        save_file(tensors, path)
        adapter = Adapter(
            file=str(path),
            layers=tuple(factors),
            rank=next(len(down) for down, _ in factors.values()),
            alpha=alpha,
            transposed=any(isinstance(modules[layer], Conv1D) for layer in factors),
        )
        return replace(self, adapter=adapter)

    def with_found_adapter(self) -> TorchModel:
        """Return the model with the adapter that a pass on blocks has put into the store, block by block."""
        found = {path: self.store.get_factors(path) for path in self.store.adapted}
        rank = next(len(down) for down, _ in found.values())
        return self.with_adapter(found, alpha=rank)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Read the adapter's tensors from disk, under PEFT's names; none where there is no adapter."""
        return {} if self.adapter is None else load_file(self.adapter.file)

    def _checkpoint_of(self, read: Callable[[str], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        """Yield every checkpoint tensor, taken from the parameter that is made of it where `read` knows that one."""
        skeleton = self.skeleton()
        owners = {name: target for target, b in skeleton.naming.of_target.items() for name, _ in b.sources}
        aliases: dict[int, list[str]] = {}
        for name, parameter in skeleton.model.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(name)
        names = {name: group for group in aliases.values() for name in group}
        for name in self.checkpoint.tensors:
            target = owners.get(name)
            found = None if target is None else _first(read, names.get(target, [target]))
            if found is None or target is None:
                yield name, self.read(name)
                continue
            if skeleton.naming.of_target[target].converter is not None:
                rows = (skeleton.naming.rows_of(target) or {}).get(name)
                if rows is None:
                    raise LlmoptError(
                        f"`{target}` cannot be taken apart into the checkpoint's tensors",
                        where=f"it is made of `{name}` and others",
                        hint="this architecture cannot be trained yet",
                    )
                found = (found if rows.expert is None else found[rows.expert])[rows.start : rows.stop]
            yield name, self._cast(name, found.reshape(self.checkpoint.tensors[name].shape))

    def save_side_files(self, directory: Path, *, config_changes: Mapping[str, Any] | None = None) -> None:
        """Write config.json (with changes), generation config, tokenizer, processor and sentence-transformers files."""
        self._write_config(directory, config_changes or {})
        copy_side_files(self.location.folder, directory, with_code=self.location.trust_remote_code)
        if self.location.sentence is not None:
            self.location.sentence.save(directory)

    def _write_config(self, directory: Path, changes: Mapping[str, Any]) -> None:
        config = dict(self.facts.config)
        if self.dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = self.dtype
        config.update(changes)
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")

    def _stored(self, layer: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a quantized layer, dequantized, the way round in which the checkpoint stores it; `dtype` may widen."""
        quantized = self.store.get(layer)
        weight = torch.empty(quantized.shape, dtype=dtype or quantized.scale.dtype)
        dequantize_into(weight, quantized)
        return weight.T.contiguous() if layer in self.store.transposed else weight

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        wanted = getattr(torch, self.stored_dtype(name))
        if tensor.dtype == wanted:
            return tensor
        cast = tensor.to(wanted)
        if not bool(torch.isfinite(cast).all()):
            raise LlmoptError(
                f"weight `{name}` does not fit into {self.dtype}",
                where=f"its largest value is {float(tensor.abs().max()):.4g}",
                hint="use bfloat16, which has the range of float32",
            )
        return cast


def _first(read: Callable[[str], Tensor | None], names: Iterable[str]) -> Tensor | None:
    return next((found for name in names if (found := read(name)) is not None), None)


def _load_buffers(skeleton: Skeleton, read: Any) -> None:
    """Load the buffers that the checkpoint holds; the others keep what the module's constructor computed."""
    targets = [name for name, _ in skeleton.model.named_buffers() if name in skeleton.naming.of_target]
    for name, tensor in skeleton.naming.load(targets, read):
        path, _, leaf = name.rpartition(".")
        module = skeleton.model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
