"""What reads the residual stream and what writes to it.

Found by what is multiplied, not from a table of families: a layer reads the stream when the rows of its input are
rows of what a norm made of the stream (an expert's input is some of them, in another order, perhaps scaled); a layer
that makes rows of the stream's width and reads something else writes to it. Whether that is all of it, the rotated
block must show (rotation.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core.errors import UsageError
from .skeleton import BlockSite, Skeleton, is_transposed
from .watch import NormCall, Unit, Watch, norm_calls

_SAMPLE = 16
"""So many rows of an input are looked at."""

_PARALLEL = 1 - 1e-8
"""Cosine from which two rows are the same but for their length."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm of the residual stream: divides a row by its length and multiplies its channels.

    Attributes:
        path: the module's path.
        multiplier: what the channels are multiplied by, (width,) float64; None when it is the same for all of them.
        one: the weight with which it multiplies by 1: 0 where it multiplies by 1 + weight.
    """

    path: str
    multiplier: Tensor | None
    one: float = 1.0


@dataclass(slots=True)
class Roles:
    """The parameters that meet the residual stream.

    Attributes:
        readers: weight -> the norm whose output it multiplies.
        writers: weights whose products are added to the stream.
        biases: their biases.
        unread: norms as wide as the stream whose output no layer reads.
    """

    readers: dict[str, Norm] = field(default_factory=dict[str, Norm])
    writers: list[str] = field(default_factory=list[str])
    biases: list[str] = field(default_factory=list[str])
    unread: list[str] = field(default_factory=list[str])


def block_roles(skeleton: Skeleton, site: BlockSite, run: Callable[[], object], width: int) -> Roles:
    """Return what reads and writes the stream in a block.

    Args:
        skeleton: the model.
        site: the block, its weights loaded.
        run: computes the block once.
        width: channels of the stream.

    Raises:
        UsageError: something in the block has no place in a rotated stream.
    """
    calls: list[NormCall] = []
    inputs: dict[str, Tensor] = {}
    modules = [(f"{site.name}.{path}", module) for path, module in site.module.named_modules()]

    def see(unit: Unit, tensor: Tensor) -> None:
        inputs.setdefault(unit[0], tensor)

    with torch.no_grad(), norm_calls(modules, calls.append), Watch(_addresses(skeleton, site), see):
        run()
    calls = [call for call in calls if call.output.shape[-1] == width]
    roles, norms = Roles(), Norms(skeleton)
    matrices = [name for name in site.parameters if skeleton.parameter(name).ndim >= 2]
    biases = {_bias(name) for name in matrices}
    shapes = {name: _shape(skeleton, name) for name in matrices if name not in biases}
    for name, tensor in inputs.items():
        outputs, columns = shapes[name]
        call = reader_of(tensor, calls) if columns == width else None
        if call is not None:
            roles.readers[name] = norms.norm(call)
        elif outputs == width:
            roles.writers.append(name)
    _add_unseen(skeleton, roles, {name: shape for name, shape in shapes.items() if name not in inputs}, width)
    roles.biases = [bias for name in roles.writers if (bias := _bias(name)) in site.parameters]
    read = {norm.path for norm in roles.readers.values()}
    roles.unread = list(dict.fromkeys(call.path for call in calls if call.path not in read))
    return roles


def reader_of(tensor: Tensor, calls: Iterable[NormCall]) -> NormCall | None:
    """Return the norm whose output a layer's input, (…, width), holds rows of."""
    rows = _unit_rows(tensor)[:_SAMPLE]
    for call in calls:
        if call.output.shape[-1] == rows.shape[-1]:
            nearest = (rows @ _unit_rows(call.output).T).abs().amax(1)
            if bool(((nearest >= _PARALLEL) | (rows == 0).all(1)).all()):
                return call
    return None


class Norms:
    """The norms that were met, each looked at once.

    Args:
        skeleton: the model.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self._known: dict[str, Norm] = {}

    def norm(self, call: NormCall) -> Norm:
        """Return what a norm does.

        Raises:
            UsageError: it does more than to divide a row by its length and multiply its channels.
        """
        if call.path not in self._known:
            self._known[call.path] = self._look(call)
        return self._known[call.path]

    def _look(self, call: NormCall) -> Norm:
        weight = call.module.get_parameter("weight").detach().double()
        given = call.input.reshape(-1, call.input.shape[-1]).double()
        if bool((weight == weight[0]).all()):
            if _parallel(call.output, given):
                return Norm(call.path, None)
        else:
            for offset in (0.0, 1.0):
                if _parallel(call.output, given * (weight + offset)):
                    return Norm(call.path, weight + offset, 1.0 - offset)
        raise refusal(
            self._skeleton, f"`{call.path}` subtracts the mean or adds a bias, which a rotation does not commute with"
        )


def refusal(skeleton: Skeleton, why: str) -> UsageError:
    """Return the error that says why a model's residual stream cannot be rotated."""
    return UsageError(
        f"the residual stream of {type(skeleton.model).__name__} cannot be rotated",
        where=why,
        hint="rotate the values of the attention heads only, with `residual: false`, or leave `rotate` out",
    )


def _addresses(skeleton: Skeleton, site: BlockSite) -> dict[int, Unit]:
    addresses: dict[int, Unit] = {}
    for name in site.parameters:
        parameter = skeleton.parameter(name).data
        if parameter.ndim == 2:
            addresses[parameter.data_ptr()] = (name, None)
        elif parameter.ndim == 3:
            addresses |= {expert.data_ptr(): (name, index) for index, expert in enumerate(parameter)}
    return addresses


def _add_unseen(skeleton: Skeleton, roles: Roles, unseen: Mapping[str, tuple[int, int]], width: int) -> None:
    """Give experts that no token came to the role of the others; refuse what is nobody's like."""
    readers = {_role(name): norm for name, norm in roles.readers.items()}
    writers = {_role(name) for name in roles.writers}
    for name, shape in unseen.items():
        if _role(name) in readers:
            roles.readers[name] = readers[_role(name)]
        elif _role(name) in writers:
            roles.writers.append(name)
        elif width in shape:
            raise refusal(skeleton, f"`{name}` is as wide as the stream, and no product with it was seen")


def _role(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _shape(skeleton: Skeleton, name: str) -> tuple[int, int]:
    """Return rows and columns of a matrix, the way round in which it multiplies."""
    outputs, inputs = skeleton.parameter(name).shape[-2:]
    transposed = is_transposed(skeleton.model.get_submodule(name.rpartition(".")[0]))
    return (inputs, outputs) if transposed else (outputs, inputs)


def _bias(name: str) -> str:
    """Return the parameter that holds the bias of a weight, if there is one: `….bias`, or `…_bias` beside experts."""
    return f"{name.removesuffix('.weight')}.bias" if name.endswith(".weight") else f"{name}_bias"


def _unit_rows(tensor: Tensor) -> Tensor:
    return nn.functional.normalize(tensor.reshape(-1, tensor.shape[-1]).double(), dim=-1)


def _parallel(made: Tensor, expected: Tensor) -> bool:
    """Return whether each row is the other one's but for its length."""
    first, second = _unit_rows(made), _unit_rows(expected)
    return bool((((first * second).sum(-1) >= _PARALLEL) | (first == second).all(-1)).all())
