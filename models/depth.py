"""Taking blocks out of a model.

What config.json must say of fewer blocks is found by what transformers makes of it, not from a table of families: a
count is a number of layers that equals the blocks of the stack, a list is one of as many entries. The module tree of
the new config must then have, in every place, the block that stays: the same parameters and the same plain attributes
(a window, a rotary base), and the model must answer as the old one does with those blocks left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..core.errors import UsageError
from .outline import block_lists, block_of
from .outside import outside_on_demand
from .producers import same
from .reference import streamed_outputs
from .replay import Replay, hidden_of
from .skeleton import BlockSite, Skeleton, empty_model
from .states import States
from .text import batches, proof_batches

if TYPE_CHECKING:
    from .handle import TorchModel

_COUNT = re.compile(r"(num|n)?_?(hidden|encoder|decoder)?_?layers?")
_FIRST = frozenset({"max_window_layers", "first_k_dense_replace", "num_dense_layers", "first_k_dense_layers"})
"""Settings that say how many of the first layers are of a kind."""

_LISTS = re.compile(r"layer|block|attention|attn|window|rope|head|intermediate|sparsity|mlp|ffn|expert|types")
_INDICES = re.compile(r"layers?$|_idxs?$|indices$")
_STATES = 1 << 30
"""Hidden states that are kept in memory while a loss is measured; the others lie on disk."""

_PLACES = re.compile(r"idx|index|layer_id|layer_number")


@dataclass(frozen=True, slots=True)
class _Stack:
    """A list of blocks.

    Attributes:
        path: of the module list.
        prefix: of the names in the checkpoint.
        sites: the blocks.
        kept: the numbers of those that stay.
    """

    path: str
    prefix: str
    sites: Sequence[BlockSite]
    kept: tuple[int, ...]


def without_blocks(model: TorchModel, dropped: Collection[str], *, seed: int) -> TorchModel:
    """Return the model without some of its blocks; see `core.model.ModelHandle`."""
    skeleton = model.skeleton()
    stacks = _stacks(model, skeleton, dropped)
    config = skeleton.config.to_dict()
    changes: dict[str, Any] = {}
    for stack in stacks:
        changes |= config_without(config, stack.path, len(stack.sites), stack.kept)
    made = type(skeleton.config).from_dict({**config, **changes})
    tree = empty_model(made, model.location, model.checkpoint)
    moved = {stack.prefix: _moved(skeleton, tree, stack) for stack in stacks}
    shorter = model.rewritten(_tensors(model, stacks, moved), changes)
    if skeleton.model.main_input_name == "input_ids":
        inputs = proof_batches(skeleton, seed)
        with leaving_out(skeleton, dropped):
            expected = streamed_outputs(skeleton, model.widened, inputs)
        got = streamed_outputs(shorter.skeleton(), shorter.widened, inputs)
        for before, after in zip(expected, got, strict=True):
            for name in before.keys() & after.keys():
                if not same(before[name], after[name]):
                    raise _refusal(skeleton, f"`{name}` is not what it is with these blocks left out")
    return shorter


def loss_without(model: TorchModel, dropped: Collection[str], rows: Sequence[Sequence[int]], tokens: int) -> float:
    """Return the mean loss of the model with some blocks left out; see `core.model.ModelHandle`."""
    skeleton = model.skeleton()
    states = States(torch.float32, model.store.folder, _STATES)
    replay = Replay(skeleton, batches(rows, decoder=False, tokens=tokens), states)
    total, count = 0.0, 0
    with outside_on_demand(skeleton, model.read), torch.no_grad(), leaving_out(skeleton, dropped):
        for stack in skeleton.stacks:
            for site in stack:
                skeleton.load(site.parameters, model.read)
                replay.finish(site, first=site is stack[0])
                skeleton.unload(site.parameters)
        for index in range(len(replay)):
            logits, ids = replay.answers(index)["logits"], replay.batch(index)["input_ids"]
            for row, targets in zip(logits, ids, strict=True):
                total += float(cross_entropy(row[:-1].float(), targets[1:], reduction="sum"))
                count += len(targets) - 1
    return total / count


@contextmanager
def leaving_out(skeleton: Skeleton, names: Collection[str]) -> Iterator[None]:
    """Let the blocks called `names` return the hidden states that they are given, for a while.

    What else a block returns stays: the first block of T5 makes the positions' bias for all.
    """

    def through(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> Any:
        hidden = hidden_of((args, kwargs))
        return hidden if isinstance(made, Tensor) else (hidden, *made[1:])

    handles = [
        site.module.register_forward_hook(through, with_kwargs=True) for site in skeleton.sites if site.name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def config_without(config: Mapping[str, Any], stack: str, total: int, kept: Sequence[int]) -> dict[str, Any]:
    """Return what changes in config.json when a stack keeps only some of its layers.

    Args:
        config: all of it, with what the architecture fills in.
        stack: path of the list of layers; one called a decoder or an encoder has settings of its own in an
            encoder-decoder.
        total: layers before.
        kept: numbers of the layers that stay, rising.

    Raises:
        UsageError: no setting holds the number of layers.
    """
    nested = config.get("text_config")
    if isinstance(nested, Mapping):
        return {"text_config": {**nested, **config_without(nested, stack, total, kept)}}
    side, other = _side(config, stack)
    changes: dict[str, Any] = {}
    counted = False
    for key, value in config.items():
        if (other and other in key) or (side == "decoder" and side not in key):
            continue
        if value == total and type(value) is int and _COUNT.fullmatch(key):
            changes[key], counted = len(kept), True
        elif key in _FIRST and isinstance(value, int) and 0 < value <= total:
            changes[key] = sum(index < value for index in kept)
        elif isinstance(value, list | tuple) and (entries := _entries(key, list(value), total, kept)) is not None:
            changes[key] = entries
    if not counted:
        raise UsageError(
            f"config.json does not say how many layers `{stack}` has",
            where=f"no setting such as num_hidden_layers is {total}",
            hint="leave `prune-depth` out",
        )
    return changes


def _side(config: Mapping[str, Any], stack: str) -> tuple[str, str]:
    """Return what the settings of a stack are called in an encoder-decoder, and those of the other."""
    if not config.get("is_encoder_decoder"):
        return "", ""
    return ("decoder", "encoder") if "decoder" in stack else ("encoder", "decoder")


def _entries(key: str, value: list[Any], total: int, kept: Sequence[int]) -> list[Any] | None:
    """Return the entries of a list with one for each layer, or of layers' numbers, that stay; None for another."""
    numbers = all(type(one) is int and 0 <= one < total for one in value)
    if numbers and value and len(value) < total and value == sorted(set(value)) and _INDICES.search(key):
        return [kept.index(one) for one in value if one in kept]
    if len(value) == total and _LISTS.search(key) and all(isinstance(one, str | int | float) for one in value):
        return [value[index] for index in kept]
    return None


def _stacks(model: TorchModel, skeleton: Skeleton, dropped: Collection[str]) -> list[_Stack]:
    """Return the stacks that lose blocks."""
    prefixes = block_lists(model.checkpoint.tensors)
    found: list[_Stack] = []
    for sites in skeleton.stacks:
        kept = tuple(index for index, site in enumerate(sites) if site.name not in dropped)
        if len(kept) == len(sites):
            continue
        if not kept:
            raise UsageError(
                f"nothing would be left of `{sites[0].name.rpartition('.')[0]}`",
                where=f"it has {len(sites)} layers",
                hint="drop fewer",
            )
        inside = {block_of(name, prefixes) for name in skeleton.naming.sources_of(sites[0].parameters)} - {None}
        (block,) = inside
        assert block is not None
        found.append(_Stack(sites[0].name.rpartition(".")[0], block.rpartition(".")[0], sites, kept))
    return found


def _moved(skeleton: Skeleton, tree: nn.Module, stack: _Stack) -> dict[str, str]:
    """Return the tensors that only the first block of a stack has, and what the new first block calls them.

    Raises:
        UsageError: a block would be of another kind in its new place.
    """
    moved: dict[str, str] = {}
    for place, index in enumerate(stack.kept):
        old = stack.sites[index].module
        new = tree.get_submodule(f"{stack.path}.{place}")
        shapes, wanted = _shapes(old), _shapes(new)
        first = _shapes(stack.sites[0].module)
        added = {name: shape for name, shape in wanted.items() if name not in shapes}
        if place == 0 and index and all(first.get(name) == shape for name, shape in added.items()):
            for name in added:
                source = skeleton.checkpoint_name(f"{stack.sites[0].name}.{name}")
                if source is not None:
                    moved[source] = source.replace(f"{stack.prefix}.0.", f"{stack.prefix}.{place}.", 1)
            wanted = {name: shape for name, shape in wanted.items() if name not in added}
        owners = tuple(name.rpartition(".")[0].rpartition(".")[0] for name in added)
        before, after = _behaviour(old, leave=owners), _behaviour(new, leave=owners)
        differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        if shapes != wanted or differing:
            what = f"`{differing[0]}` differs" if differing else "it has other parameters"
            raise _refusal(
                skeleton,
                f"`{stack.sites[index].name}` would be another kind of block in the place of "
                f"`{stack.path}.{place}`: {what}",
            )
    return moved


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def _behaviour(module: nn.Module, *, leave: tuple[str, ...]) -> dict[str, Any]:
    """Return the plain attributes of a block's modules, but for what lies in `leave`, and what tells their place."""
    return {
        f"{path}.{key}".lstrip("."): value
        for path, one in module.named_modules()
        if not any(path == owner or path.startswith(f"{owner}.") for owner in leave)
        for key, value in vars(one).items()
        if isinstance(value, bool | int | float | str) and not key.startswith("_") and not _PLACES.search(key)
    }


def _tensors(
    model: TorchModel, stacks: Sequence[_Stack], moved: Mapping[str, Mapping[str, str]]
) -> Iterator[tuple[str, Tensor]]:
    prefixes = tuple(stack.prefix for stack in stacks)
    places = {
        f"{stack.prefix}.{index}": f"{stack.prefix}.{place}"
        for stack in stacks
        for place, index in enumerate(stack.kept)
    }
    for name in model.tensor_specs():
        block = block_of(name, prefixes)
        if block is None:
            yield name, model.read(name)
        elif block in places:
            yield places[block] + name[len(block) :], model.read(name)
        elif name in moved[block.rpartition(".")[0]]:
            yield moved[block.rpartition(".")[0]][name], model.read(name)


def _refusal(skeleton: Skeleton, why: str) -> UsageError:
    return UsageError(
        f"these blocks cannot be taken out of {type(skeleton.model).__name__}",
        where=why,
        hint="name others with `layers`, so that the pattern of the layers stays",
    )
