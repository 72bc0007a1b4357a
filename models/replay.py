"""Bringing calibration samples to a block through the model's own code.

For each block the model's forward runs once more, with every earlier block replaced by what the last of them returned
and the block itself replaced by a catcher. So masks, positions, per-layer arguments and the encoder's states come from
the model itself and need not be known here; only one set of hidden states is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import LlmoptError
from .skeleton import BlockSite, Skeleton
from .states import States, first_rows

Batch = dict[str, Tensor]
Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Caught(Exception):  # noqa: N818  (control flow, no error)
    """The block's arguments are known; the rest of the forward pass is not wanted."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer to one batch: log probabilities, (rows, tokens, vocabulary), or hidden states."""

    values: Tensor
    logs: bool


def distance(expected: Answer, got: Answer) -> float:
    """Return the mean KL divergence, nats a token; of hidden states the squared error over the mean square."""
    if not expected.logs:
        return float((got.values - expected.values).square().mean() / expected.values.square().mean())
    rows = [
        (first.exp() * (first - second)).sum(-1).mean()
        for first, second in zip(expected.values, got.values, strict=True)
    ]
    return float(torch.stack(rows).mean())


def hidden_of(call: Call) -> Tensor:
    """Return the hidden states that a block is called with: the first tensor of numbers."""
    return next(
        value for value in (*call[0], *call[1].values()) if isinstance(value, Tensor) and value.is_floating_point()
    )


class Replay:
    """The calibration samples on their way through the blocks.

    Args:
        skeleton: the model; what lies outside its blocks must be loadable on demand.
        batches: model inputs, rows of equal length in each.
        states: where the outputs of finished blocks are kept.
        first_stack: number by which `states` knows the first stack, where it keeps those of another replay too.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        batches: Sequence[Batch],
        states: States | None = None,
        *,
        first_stack: int = 0,
    ) -> None:
        self._skeleton = skeleton
        self._batches = batches
        self._states = States(torch.float32) if states is None else states
        self._first_stack = first_stack
        self._finished: list[list[BlockSite]] = []

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def call(self, site: BlockSite, index: int, *, tokens: int | None = None) -> Call:
        """Return the arguments with which the model calls block `site` on batch `index`.

        Args:
            site: the block.
            index: the batch.
            tokens: only so many of its rows as hold this many tokens; all of them by default.

        Raises:
            LlmoptError: the forward pass never comes to the block.
        """
        caught: list[Call] = []

        def catch(*args: Any, **kwargs: Any) -> None:
            caught.append((args, kwargs))
            raise _Caught

        rows = None if tokens is None else self._rows_of(index, tokens)
        batch = {name: tensor[:rows] for name, tensor in self._batches[index].items()}
        with _replaced([(site.module, catch), *self._stubs(index, rows)]), torch.no_grad():
            try:
                self._skeleton.model(**batch)
            except _Caught:
                return caught[0]
            except IndexError as error:
                raise LlmoptError(
                    "the model cannot take the calibration samples",
                    where=f"{type(self._skeleton.model).__name__}: {error}",
                    hint="use a shorter --length; or the tokenizer beside the weights is that of another model",
                ) from error
        raise LlmoptError(
            f"the calibration samples never reach `{site.name}`",
            hint="use a pass that needs no calibration data, such as rtn",
        )

    def finish(self, site: BlockSite, first: bool) -> None:
        """Run the finished block on every batch and keep what it returns.

        Args:
            site: the block, its final weights loaded.
            first: whether it is the first of its stack.
        """
        stack = len(self._finished) - (not first)
        for index in range(len(self._batches)):
            args, kwargs = self.call(site, index)
            with torch.no_grad():
                self._states[self._first_stack + stack, index] = site.module(*args, **kwargs)
        if first:
            self._finished.append([])
        self._finished[-1].append(site)

    def take_up(self, finished: Sequence[BlockSite]) -> None:
        """Go on behind blocks that another process has finished, whose outputs `states` holds."""
        for stack in self._skeleton.stacks:
            done = [site for site in stack if site in finished]
            if done:
                self._finished.append(done)

    def answer(
        self,
        site: BlockSite,
        index: int,
        made: Any,
        read: Callable[[str], Tensor],
        *,
        later_blocks: bool,
        tokens: int | None = None,
    ) -> Answer:
        """Run the model on a batch from block `site` on; see `outputs`."""
        outputs = self.outputs(site, index, made, read, later_blocks=later_blocks, tokens=tokens)
        if "logits" in outputs:
            return Answer(torch.log_softmax(outputs["logits"].float(), -1), True)
        return Answer(next(iter(outputs.values())), False)

    def outputs(
        self,
        site: BlockSite,
        index: int,
        made: Any,
        read: Callable[[str], Tensor],
        *,
        later_blocks: bool = True,
        tokens: int | None = None,
    ) -> dict[str, Tensor]:
        """Run the model on a batch from block `site` on, the blocks after it loaded one after another.

        Args:
            site: the block that is being worked on.
            index: the batch.
            made: what the block returns.
            read: gives a checkpoint tensor by name.
            later_blocks: run the later blocks of the stack; otherwise what follows them reads `made`.
            tokens: as in `call`.
        """
        stack = next(stack for stack in self._skeleton.stacks if any(one is site for one in stack))
        upto = stack[: next(at for at, one in enumerate(stack) if one is site) + 1] if later_blocks else stack
        rows = None if tokens is None else self._rows_of(index, tokens)
        stubs = dict(self._stubs(index, rows)) | {one.module: lambda *_, **__: made for one in upto}
        batch = {name: tensor[:rows] for name, tensor in self._batches[index].items()}
        later = [one for one in self._skeleton.sites if one.module not in stubs]
        with _replaced(list(stubs.items())), _in_turn(self._skeleton, later, read), torch.no_grad():
            outputs = self._skeleton.model(**batch, return_dict=True)
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}

    def batch(self, index: int) -> Batch:
        """Return the model's inputs of a batch."""
        return self._batches[index]

    def answers(self, index: int) -> dict[str, Tensor]:
        """Return what the model makes of a batch when every block is finished."""
        with _replaced(self._stubs(index)), torch.no_grad():
            outputs = self._skeleton.model(**self._batches[index], return_dict=True)
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}

    def _rows_of(self, index: int, tokens: int) -> int:
        length = next(iter(self._batches[index].values())).shape[1]
        return -(-tokens // length)

    def _stubs(self, index: int, rows: int | None = None) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """Return what stands in for the finished blocks on a batch: each stack's last output, fetched once."""
        whole = len(next(iter(self._batches[index].values())))

        @cache
        def fetch(stack: int) -> Any:
            output = self._states[self._first_stack + stack, index]
            return output if rows is None else first_rows(output, rows, whole)

        return [
            (site.module, lambda *_, _stack=stack, **__: fetch(_stack))
            for stack, sites in enumerate(self._finished)
            for site in sites
        ]


@contextmanager
def _in_turn(skeleton: Skeleton, sites: Sequence[BlockSite], read: Callable[[str], Tensor]) -> Iterator[None]:
    """Load each block's weights before it computes and free them after."""
    handles: list[Any] = []
    for site in sites:

        def before(_: nn.Module, __: Any, site: BlockSite = site) -> None:
            skeleton.load(site.parameters, read)

        def after(_: nn.Module, __: Any, ___: Any, site: BlockSite = site) -> None:
            skeleton.unload(site.parameters)

        handles.append(site.module.register_forward_pre_hook(before))
        handles.append(site.module.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replaced(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Give modules another forward for a while."""
    for module, forward in forwards:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in forwards:
            del module.forward
