"""Which axes of which weights are neurons, heads or channels of the residual stream, and taking some of them away.

The axes are read off from two module trees, that of config.json and that of the same with another size: an axis that
changes follows that size. How a longer axis is divided among units (queries, keys and values one after another, or
head by head) is found by trial: with the units of every block in another order, along every axis, the model must answer
as before. The code that reorders is the code that takes away.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice, product
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.errors import UsageError
from ..core.model import ChannelSet, WidthKind
from ..core.sizes import group_setting, head_setting, head_size_setting, hidden_setting, mlp_settings
from .cuts import Axis, Channels, Cut, Keep, Size, nested_settings
from .producers import same
from .reference import streamed_outputs
from .skeleton import CONFIG_ERRORS, Skeleton, empty_model
from .text import proof_batches

if TYPE_CHECKING:
    from .handle import TorchModel

_LAYOUTS = 8
"""So many ways to divide the axes are tried."""

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def channels(model: TorchModel, kinds: Sequence[WidthKind], *, seed: int, keep: Keep | None = None) -> Channels:
    """Return the units that a model may lose; see `core.model.ModelHandle`."""
    skeleton = model.skeleton()
    if skeleton.model.main_input_name != "input_ids":
        raise UsageError(
            f"{type(skeleton.model).__name__} takes {skeleton.model.main_input_name}, and pruning is proven with text",
            hint="leave the pass out",
        )
    found = Channels((), {}, {})
    for kind in kinds:
        one = _found(model, skeleton, kind, seed, keep)
        found.sets += one.sets
        found._sizes |= one._sizes
        found._group_size |= one._group_size
        for name, cuts in one._cuts.items():
            found._cuts.setdefault(name, []).extend(cuts)
    return found


def _found(model: TorchModel, skeleton: Skeleton, kind: WidthKind, seed: int, keep: Keep | None) -> Channels:
    sizes = list(_sizes(skeleton, kind))
    groups = {size.name: _axes(model, skeleton, size, keep) for size in sizes}
    groups = {name: axes for name, axes in groups.items() if axes}
    if not groups:
        raise _refusal(skeleton, kind, f"no weight follows {' or '.join(size.name for size in sizes) or 'a setting'}")
    axes = [one for axes in groups.values() for one in axes]
    by_name = {size.name: size for size in sizes if size.name in groups}
    of_group = {one.group: name for name, axes in groups.items() for one in axes}
    heads = _repeats(skeleton) if kind == "heads" else None
    layouts = islice(_layouts(axes, heads), _LAYOUTS)
    if kind == "vocabulary":
        layouts = islice(layouts, 1)
    for layout in layouts:
        made = _channels(skeleton, layout, kind, by_name, of_group)
        if kind == "vocabulary" or _is_proven(model, skeleton, made, kind, seed):
            return made
    raise _refusal(skeleton, kind, "with units in another order it does not answer as before")


def _sizes(skeleton: Skeleton, kind: WidthKind) -> Iterator[Size]:
    config = skeleton.config.to_dict()
    if kind == "vocabulary":
        yield Size(
            kind, "vocab_size", skeleton.config.get_text_config().vocab_size, lambda count: {"vocab_size": count}
        )
    if kind == "mlp":
        for name, value in mlp_settings(config).items():
            yield Size(kind, name, value, lambda count, name=name: {name: count})
    head_size = head_size_setting(config)
    if kind == "hidden" and (hidden := hidden_setting(config)) is not None:
        own = {} if head_size is None else dict([head_size])
        yield Size(kind, hidden[0], hidden[1], lambda count: {hidden[0]: count, **own})
    heads, groups = head_setting(config), group_setting(config)
    if kind == "heads" and heads is not None and head_size is not None:
        number = groups[1] if groups is not None else heads[1]
        repeats = heads[1] // number
        if number == 1:
            raise _refusal(skeleton, kind, "it has one head of keys and values")

        def settings(count: int) -> dict[str, Any]:
            shared = {} if groups is None else {groups[0]: count}
            return {heads[0]: repeats * count, **shared, head_size[0]: head_size[1]}

        yield Size(kind, heads[0], number, settings)


def _repeats(skeleton: Skeleton) -> tuple[int, int]:
    """Return how many queries share a head of keys and values, and the channels of a head."""
    config = skeleton.config.to_dict()
    heads, groups, size = head_setting(config), group_setting(config), head_size_setting(config)
    assert heads is not None, "asked for before"
    assert size is not None, "asked for before"
    return heads[1] // (heads[1] if groups is None else groups[1]), size[1]


def _axes(model: TorchModel, skeleton: Skeleton, size: Size, keep: Keep | None) -> list[Axis]:
    """Return the axes that follow a size, each taken to be one part."""
    probe = size.probe(keep)
    tree = _tree(model, skeleton, size, probe)
    before, after = _shapes(skeleton, skeleton.model), _shapes(skeleton, tree)
    if before.keys() != after.keys():
        raise _refusal(skeleton, size.kind, f"another `{size.name}` makes a model of other parameters")
    changed = [
        (name, axis, old, new)
        for name in before
        for axis, (old, new) in enumerate(zip(before[name], after[name], strict=True))
        if old != new
    ]
    if not changed:
        return []
    units = size.units
    if units is None:  # the architecture's own number: the least that follows
        units = min(old * probe // new for _, _, old, new in changed)
    _check_factors(skeleton, tree, size)
    found: list[Axis] = []
    for name, axis, old, new in changed:
        if old * probe != new * units or old % units:
            raise _refusal(
                skeleton,
                size.kind,
                f"`{name}` has {old} where `{size.name}` is {units}, and would have {new} where it is {probe}",
            )
        found.append(Axis(name, axis, _group(skeleton, size, name), units, (old // units,)))
    return found


def _tree(model: TorchModel, skeleton: Skeleton, size: Size, probe: int) -> nn.Module:
    config = skeleton.config.to_dict()
    config |= nested_settings(config, size.settings(probe))
    try:
        return empty_model(type(skeleton.config).from_dict(config), model.location, model.checkpoint)
    except (*CONFIG_ERRORS, UsageError) as error:
        said = " ".join(str(getattr(error, "where", None) or error).split())
        raise _refusal(skeleton, size.kind, f"{size.name} cannot be {_count(size, probe)}: {said[:300]}") from None


def _count(size: Size, units: int) -> int:
    """Return what the setting of a size is for so many units."""
    return int(size.settings(units).get(size.name, units))


def _check_factors(skeleton: Skeleton, tree: nn.Module, size: Size) -> None:
    """Refuse a size that something is multiplied by (Gemma's embeddings): the weights would not be what they were."""
    others = dict(tree.named_modules())
    for path, module in skeleton.model.named_modules():
        for key, value in vars(module).items():
            if type(value) is float and path in others and getattr(others[path], key, value) != value:
                raise _refusal(
                    skeleton, size.kind, f"`{path}.{key}` follows `{size.name}`, and weights are scaled by it"
                )


def _group(skeleton: Skeleton, size: Size, name: str) -> str:
    """Return the set that an axis of parameter `name` belongs to: each block chooses for itself, and each expert."""
    if size.kind in ("hidden", "vocabulary"):
        return size.name
    site = next((site for site in skeleton.sites if name.startswith(f"{site.name}.")), None)
    if site is None:
        raise _refusal(skeleton, size.kind, f"`{name}` lies outside the blocks")
    if (match := _EXPERT.search(name)) is not None:
        return f"{site.name}:{size.name}:{match[1]}"
    several = skeleton.parameter(name).ndim == 3
    experts = ".experts." in name and (several or (skeleton.parameter(name).ndim == 2 and name.endswith("_bias")))
    return f"{site.name}:{size.name}" + (":{}" if experts else "")


def _shapes(skeleton: Skeleton, tree: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a tree's parameters, and of the buffers that the checkpoint holds."""
    buffers = ((name, value) for name, value in tree.named_buffers() if name in skeleton.naming.of_target)
    return {name: value.shape for name, value in chain(tree.named_parameters(), buffers)}


def _shape(skeleton: Skeleton, name: str) -> torch.Size:
    path, _, leaf = name.rpartition(".")
    module = skeleton.model.get_submodule(path)
    return (module.get_parameter(leaf) if leaf in module._parameters else module.get_buffer(leaf)).shape


def _layouts(axes: Sequence[Axis], heads: tuple[int, int] | None) -> Iterator[list[Axis]]:
    """Yield the ways in which the axes may be divided; alike parameters of all blocks are divided alike."""
    roles: dict[tuple[str, int, int], list[tuple[int, ...]]] = {}
    for one in axes:
        roles.setdefault(_role(one), _divisions(one.parts[0], heads))
    for chosen in product(*roles.values()):
        parts = dict(zip(roles, chosen, strict=True))
        yield [Axis(one.parameter, one.axis, one.group, one.units, parts[_role(one)]) for one in axes]


def _role(axis: Axis) -> tuple[str, int, int]:
    return re.sub(r"\.\d+\.", ".*.", axis.parameter), axis.axis, axis.parts[0]


def _divisions(width: int, heads: tuple[int, int] | None) -> list[tuple[int, ...]]:
    if width == 1:
        return [(1,)]
    if heads is not None:
        repeats, size = heads
        parts = (repeats * size, size, size)
        if width == sum(parts):
            return [parts, (width,)]
        return [(width,), (size, size)] if width == 2 * size else [(width,)]
    return [(width // 2, width // 2), (width,)] if width % 2 == 0 else [(1,) * width, (width,)]


def _channels(
    skeleton: Skeleton,
    axes: Sequence[Axis],
    kind: WidthKind,
    sizes: dict[str, Size],
    of_group: Mapping[str, str],
) -> Channels:
    """Return the sets of units, what reads them, and what is cut of each tensor."""
    cuts: dict[str, list[Cut]] = {}
    readers: dict[str, dict[str, tuple[int, ...]]] = {}
    units: dict[str, int] = {}
    group_size: dict[str, str] = {}
    views: dict[str, list[Any]] = {}
    for view in (view for site in skeleton.sites for view in site.views):
        views.setdefault(view.parameter, []).append(view)
    for axis in axes:
        shape = _shape(skeleton, axis.parameter)
        names = [axis.group]
        if "{}" in axis.group:
            names = [axis.group.format(expert) for expert in range(shape[0])]
        for name in names:
            units[name], group_size[name] = axis.units, of_group[axis.group]
            readers.setdefault(name, {})
        for view in views.get(axis.parameter, ()):
            inward = axis.axis == (len(shape) - 2 if view.transposed else len(shape) - 1)
            if inward:
                expert = None if view.rows is None else view.rows.expert
                readers[axis.group.format(expert)][view.linear.name] = axis.parts
        for name, cut in _tensor_cuts(skeleton, axis, kind):
            cuts.setdefault(name, []).append(cut)
    sets = tuple(
        ChannelSet(name=name, kind=kind, size=group_size[name], units=count, readers=readers[name])
        for name, count in units.items()
    )
    return Channels(sets, sizes, cuts, group_size)


def _tensor_cuts(skeleton: Skeleton, axis: Axis, kind: WidthKind) -> Iterator[tuple[str, Cut]]:
    """Yield what is cut of the checkpoint tensors that a parameter is made of."""
    names = [alias for alias in skeleton.aliases(axis.parameter) if alias in skeleton.naming.of_target]
    if not names:
        return
    binding = skeleton.naming.of_target[names[0]]
    if binding.converter is None:
        yield binding.sources[0][0], Cut(axis.axis, axis.group, axis, each="{}" in axis.group)
        return
    located = skeleton.naming.rows_of(names[0])
    dimensions = len(_shape(skeleton, axis.parameter))
    if located is None or axis.axis < dimensions - 2:
        raise _refusal(skeleton, kind, f"`{axis.parameter}` does not lie in the checkpoint row by row")
    for name, rows in located.items():
        group = axis.group.format(rows.expert)
        if axis.axis == dimensions - 1:
            yield name, Cut(1, group, axis)
            continue
        inside, start = [], 0
        for width in axis.parts:
            if rows.start <= start and start + axis.units * width <= rows.stop:
                inside.append(width)
            start += axis.units * width
        if sum(inside) * axis.units != rows.stop - rows.start:
            raise _refusal(skeleton, kind, f"`{name}` holds a part of a unit of `{axis.parameter}`")
        yield name, Cut(0, group, Axis(axis.parameter, 0, group, axis.units, tuple(inside)))


def _is_proven(model: TorchModel, skeleton: Skeleton, made: Channels, kind: WidthKind, seed: int) -> bool:
    """Return whether the model answers as before with the units of every set in another order."""
    generator = torch.Generator().manual_seed(seed)
    order = {one.name: torch.randperm(one.units, generator=generator) for one in made.sets}
    inputs = proof_batches(skeleton, seed)
    before = streamed_outputs(skeleton, model.widened, inputs)
    after = streamed_outputs(skeleton, lambda name: made.changed(name, model.widened(name), order), inputs)
    stream = next(iter(order.values())) if kind == "hidden" else None
    for first, second in zip(before, after, strict=True):
        for name, value in first.items():
            if not value.is_floating_point():
                continue
            turned = stream is not None and value.shape[-1] == len(stream)
            alike = same(value, second[name])
            if not alike and not (stream is not None and turned and same(value.index_select(-1, stream), second[name])):
                return False
    return True


def _refusal(skeleton: Skeleton, kind: WidthKind, why: str) -> UsageError:
    what = {
        "mlp": "the MLPs",
        "heads": "the attention heads",
        "hidden": "the hidden size",
        "vocabulary": "the vocabulary",
    }
    return UsageError(
        f"{what[kind]} of {type(skeleton.model).__name__} cannot be pruned",
        where=why,
        hint=f"leave `{kind}` out",
    )
