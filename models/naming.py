"""Between the names of a checkpoint and the parameters of a module.

transformers renames and merges tensors while it loads (a checkpoint's `experts.3.w1.weight` becomes a slice of the
module's `experts.gate_up_proj`). Its own conversion table is used here, tensor by tensor, so that one block can be
loaded without the rest of the model. The checkpoint's names are the ones that llmopt shows and writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..core.errors import LlmoptError
from .checkpoint import Checkpoint


@dataclass(slots=True)
class Binding:
    """Parameters that are made from checkpoint tensors in one step.

    Attributes:
        targets: parameter names, and the shape of each.
        sources: (checkpoint name, pattern of the converter it feeds).
        converter: transformers' converter, None for a mere renaming.
    """

    first: str
    converter: WeightConverter | None
    sources: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    targets: dict[str, torch.Size] = field(default_factory=dict[str, torch.Size])

    def convert(self, read: Callable[[str], Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """Return the parameters, each source tensor taken from `read`."""
        if self.converter is None:
            return {self.first: read(self.sources[0][0])}
        converter = deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.first, name, pattern, read(name))  # pyright: ignore[reportArgumentType]
        made: dict[str, Any] = converter.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True, slots=True)
class Rows:
    """Where a checkpoint matrix lies in a parameter: rows `start:stop` of slice `expert` (None for a 2-D parameter)."""

    expert: int | None
    start: int
    stop: int


class Naming:
    """The bindings of one model to one checkpoint.

    Args:
        model: the skeleton, its parameters on the meta device.
        checkpoint: the tensors on disk.

    Raises:
        LlmoptError: a parameter has no tensor, or one of another shape.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self.bindings, self.unused = _bind(model, checkpoint)
        self.of_target = {target: binding for binding in self.bindings for target in binding.targets}
        self._check()

    def load(self, targets: Iterable[str], read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters called `targets` (and any that are made in the same step), one after the other."""
        wanted: dict[str, Binding] = {}
        for target in targets:
            binding = self.of_target[target]
            wanted[binding.first] = binding
        for binding in wanted.values():
            yield from binding.convert(read, self._model).items()

    def rows_of(self, target: str) -> dict[str, Rows] | None:
        """Return which rows of a merged parameter come from which checkpoint tensor.

        Found by sending row numbers through the conversion. None when rows do not survive it (a transposition).
        """
        binding = self.of_target[target]
        infos = self._checkpoint.tensors
        bases: dict[str, int] = {}
        total = 0
        for name, _ in binding.sources:
            bases[name] = total
            total += infos[name].shape[0]

        def numbers(name: str) -> Tensor:
            return torch.arange(bases[name], bases[name] + infos[name].shape[0]).unsqueeze(-1)

        try:
            made = binding.convert(numbers, self._model)[target]
        except (RuntimeError, ValueError, IndexError):
            return None
        if made.shape[-1] != 1 or made.shape[:-1] != binding.targets[target][:-1]:
            return None
        return _find_rows(made.squeeze(-1), bases, {name: infos[name].shape[0] for name in bases})

    def sources_of(self, targets: Iterable[str]) -> list[str]:
        """Return the checkpoint tensors that the parameters called `targets` are made of."""
        bindings = {
            self.of_target[target].first: self.of_target[target] for target in targets if target in self.of_target
        }
        return [name for binding in bindings.values() for name, _ in binding.sources]

    def _check(self) -> None:
        ignorable = [re.compile(pattern) for pattern in self._model._keys_to_ignore_on_load_missing or ()]
        self._check_layers()
        tied = _tied_groups(self._model)
        for name, parameter in self._model.named_parameters():
            if any(alias in self.of_target for alias in tied.get(id(parameter), (name,))):
                continue
            if any(pattern.search(name) for pattern in ignorable):
                continue
            raise LlmoptError(
                f"weight `{name}` is missing from the checkpoint",
                where=f"{self._checkpoint.folder}: config.json describes a {type(self._model).__name__} that has it",
                hint="the checkpoint is incomplete or belongs to another config.json",
            )
        expected = {name: value.shape for name, value in self._model.state_dict().items()}
        for binding in self.bindings:
            for target, shape in binding.targets.items():
                if target in expected and shape != expected[target]:
                    raise LlmoptError(
                        f"weight `{binding.sources[0][0]}` has another shape than config.json says",
                        where=f"it gives {target} {list(shape)}, the model has {list(expected[target])}",
                        hint="the weights belong to another config.json",
                    )

    def _check_layers(self) -> None:
        """Refuse a checkpoint with more blocks than config.json has: transformers would drop the last ones silently."""
        ignorable = [re.compile(pattern) for pattern in self._model._keys_to_ignore_on_load_unexpected or ()]
        used = {_role(name) for binding in self.bindings for name, _ in binding.sources}
        for name in self.unused:
            if _role(name) in used and not any(pattern.search(name) for pattern in ignorable):
                raise LlmoptError(
                    f"the checkpoint holds weights that config.json has no place for, such as `{name}`",
                    where=f"{self._checkpoint.folder}: {type(self._model).__name__} of that config.json is smaller",
                    hint="the weights belong to another config.json",
                )


def _role(name: str) -> str:
    """Return a tensor's name with `*` for the number of its block, and of its expert."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _tied_groups(model: PreTrainedModel) -> dict[int, list[str]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return groups


def _bind(model: PreTrainedModel, checkpoint: Checkpoint) -> tuple[list[Binding], list[str]]:
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    bindings: dict[str, Binding] = {}
    unused: list[str] = []
    for name in sorted(checkpoint.tensors, key=_natural):
        first, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if first not in state and name in state:
            first, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if first not in state:
            unused.append(name)
            continue
        binding = bindings.setdefault(first, Binding(first, of_pattern[pattern] if pattern else None))
        binding.sources.append((name, pattern or name))
    for binding in bindings.values():
        try:
            made = binding.convert(lambda name: _meta(checkpoint, name), model)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise LlmoptError(
                f"the weights that `{binding.first}` is made of do not fit together",
                where=f"{len(binding.sources)} tensors, `{binding.sources[0][0]}` first\n{str(error).splitlines()[0]}",
                hint="the checkpoint is incomplete or belongs to another config.json",
            ) from error
        binding.targets = {target: tensor.shape for target, tensor in made.items()}
    return list(bindings.values()), unused


def _meta(checkpoint: Checkpoint, name: str) -> Tensor:
    return torch.empty(checkpoint.tensors[name].shape, device="meta")


def _natural(name: str) -> list[Any]:
    """Order experts.10 behind experts.9: the converters stack tensors in the order in which they come."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _find_rows(numbers: Tensor, bases: dict[str, int], heights: dict[str, int]) -> dict[str, Rows] | None:
    """Locate each source's run of row numbers in `numbers`, (rows,) or (experts, rows)."""
    stacked = numbers.ndim == 2
    table = numbers if stacked else numbers.unsqueeze(0)
    starts = {base: name for name, base in bases.items()}
    found: dict[str, Rows] = {}
    for expert in range(table.shape[0]):
        row, position = table[expert].tolist(), 0
        while position < len(row):
            name = starts.get(row[position])
            if name is None:
                return None
            stop = position + heights[name]
            if row[position:stop] != list(range(bases[name], bases[name] + heights[name])):
                return None
            found[name] = Rows(expert if stacked else None, position, stop)
            position = stop
    return found if len(found) == len(bases) else None
