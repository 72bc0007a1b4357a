"""Reading what a model computes inside: the states after its blocks, and the queries, keys and values of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...core.errors import UsageError

_PARTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
)
"""How models call the layers that make queries, keys and values."""


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the model's repeated blocks: the outermost module list that holds the most parameters.

    Raises:
        UsageError: there is none.
    """
    lists: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists.append((path, module))
    if not lists:
        raise UsageError(
            f"{type(model).__name__} has no repeated blocks",
            where="pass `distill`",
            hint="leave the losses on hidden states and relations out",
        )
    _, largest = max(lists, key=lambda pair: sum(one.numel() for one in pair[1].parameters()))
    return list(largest)


def attention_parts(block: nn.Module) -> tuple[nn.Module, ...]:
    """Return the layers of a block that make queries, keys and values.

    Raises:
        UsageError: they are not three layers of their own.
    """
    by_leaf = {path.rpartition(".")[2]: module for path, module in block.named_modules()}
    for names in _PARTS:
        if all(name in by_leaf for name in names):
            return tuple(by_leaf[name] for name in names)
    raise UsageError(
        f"{type(block).__name__} does not make queries, keys and values in layers of their own",
        where=f"pass `distill`, loss `relation`: layers {', '.join(sorted(by_leaf)[:8])}",
        hint="use `hidden` instead of `relation`",
    )


class Taps:
    """What passes through some modules of a model, kept from one forward pass.

    Args:
        modules: by name.

    Attributes:
        seen: what each of them returned last, (batch, sequence, width).
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.seen: dict[str, Tensor] = {}
        self._modules = modules

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note while a forward pass runs."""
        handles = [module.register_forward_hook(self._taker(name)) for name, module in self._modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> dict[str, Tensor]:
        """Return what was seen, and forget it."""
        seen, self.seen = self.seen, {}
        return seen

    def _taker(self, name: str) -> Any:
        def take(_: nn.Module, __: Any, output: Any) -> None:
            self.seen[name] = output[0] if isinstance(output, tuple) else output

        return take


def matched(student: int, teacher: int) -> list[tuple[int, int]]:
    """Return which block of the teacher each block of the student is compared with: evenly, the last with the last."""
    return [(index, round((index + 1) * teacher / student) - 1) for index in range(student)]
