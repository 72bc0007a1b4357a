"""Seeing what a linear layer multiplies, whatever module it sits in.

Every matrix product whose weight operand lies in a watched parameter is noticed by the address of that operand. So one
mechanism serves Linear, Conv1D, fused projections and single experts of a 3-D parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's customary name)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Unit = tuple[str, int | None]
"""A weight that is multiplied as one: a parameter, and the expert in it."""

_INPUT_FIRST = {F.linear, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm}
_INPUT_SECOND = {torch.addmm, Tensor.addmm}


def input_position(func: Callable[..., Any], args: tuple[Any, ...]) -> int | None:
    """Return at which argument a matrix product takes its input, before the weight; None for any other function."""
    at = 0 if func in _INPUT_FIRST else 1 if func in _INPUT_SECOND else None
    if at is None or len(args) < at + 2 or not isinstance(args[at + 1], Tensor) or args[at + 1].ndim != 2:
        return None
    return at


class Interception(TorchFunctionMode):
    """Sees the arguments of every torch function inside the context before it runs."""

    def arguments(self, func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the positional arguments to run `func` with."""
        raise NotImplementedError

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function."""
        return func(*self.arguments(func, args), **(kwargs or {}))


class Watch(Interception):
    """Calls `receive(unit, input)` for every product with a watched weight inside the context.

    Args:
        addresses: the data pointer of each unit's weight.
        receive: gets the unit and the product's input, (…, in_features).
    """

    def __init__(self, addresses: Mapping[int, Unit], receive: Callable[[Unit, Tensor], None]) -> None:
        super().__init__()
        self._addresses = addresses
        self._receive = receive

    def arguments(self, func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Notice a product."""
        at = input_position(func, args)
        if at is not None:
            unit = self._addresses.get(args[at + 1].data_ptr())
            if unit is not None:
                self._receive(unit, args[at])
        return args


class CacheWatch(Interception):
    """Calls `receive(keys, values)` for every attention inside the context.

    Args:
        receive: gets keys and values, (rows, heads, tokens, head size).
    """

    def __init__(self, receive: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._receive = receive

    def arguments(self, func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Notice attention."""
        if func is F.scaled_dot_product_attention:
            self._receive(args[1], args[2])
        return args


@dataclass(slots=True)
class Sighting:
    """What a first run through a block showed of one unit: its input, kept alive so that its address stays its own."""

    input: Tensor
    times: int = 1


@dataclass(frozen=True, slots=True)
class NormCall:
    """One call of a module that has a 1-D weight.

    Attributes:
        path: the module's path.
        module: the module.
        input: what it was given.
        output: what it made of it.
    """

    path: str
    module: nn.Module
    input: Tensor
    output: Tensor


@contextmanager
def norm_calls(modules: Iterable[tuple[str, nn.Module]], receive: Callable[[NormCall], None]) -> Iterator[None]:
    """Tell of every call of those of `modules`, (path, module), that have a 1-D weight."""
    handles: list[Any] = []
    for path, module in modules:
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 1:

            def note(module: nn.Module, given: tuple[Any, ...], made: Any, path: str = path) -> None:
                if given and isinstance(given[0], Tensor) and isinstance(made, Tensor):
                    receive(NormCall(path, module, given[0], made))

            handles.append(module.register_forward_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def same_input(first: Tensor, second: Tensor) -> bool:
    """Return whether two inputs are the same memory seen the same way, rows of tokens flattened or not."""
    if (
        first.data_ptr() != second.data_ptr()
        or first._version != second._version
        or first.shape[-1:] != second.shape[-1:]
    ):
        return False
    if first.is_contiguous() and second.is_contiguous():
        return first.numel() == second.numel()
    return first.shape == second.shape and first.stride() == second.stride()
