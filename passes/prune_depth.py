"""Fewer layers: whole blocks taken out of a model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ..core.block import Block, Linear
from ..core.errors import UsageError
from ..core.facts import ModelFacts
from ..core.model import ModelHandle
from ..core.params import Params
from ..core.passes import Need, PassContext, PassResult, SurveyPass
from ..core.target import Target
from .amounts import amount, lowest

_NUMBER = re.compile(r"(.*?[A-Za-z_]\w*)\.(\d+)\.")


class PruneDepthParams(Params, frozen=True, kw_only=True):
    """Parameters of `prune-depth`."""

    drop: Annotated[
        Annotated[int, Meta(ge=1)] | str | None,
        Meta(description="How many blocks to take out of every stack: a number, or a share of them such as `25%`."),
    ] = None
    layers: Annotated[
        tuple[Annotated[int, Meta(ge=0)], ...],
        Meta(description="The numbers of the blocks to take out, counted from 0, instead of measuring which."),
    ] = ()
    by: Annotated[
        Literal["influence", "answers", "loss"],
        Meta(
            description="What tells which blocks matter least: how much they turn the hidden states (`influence`) or "
            "move what the model would answer to them (`answers`), measured in one sweep; or the loss of a language "
            "model without each of them (`loss`), measured anew after each that is taken out and again with each of "
            "those put back, which takes a sweep for each block and each round, and is the best."
        ),
    ] = "answers"
    stack: Annotated[
        Literal["encoder", "decoder"] | None,
        Meta(description="The stack of an encoder-decoder to take blocks out of; both when not given."),
    ] = None


class PruneDepth(SurveyPass[PruneDepthParams]):
    """Take out the blocks that matter least, or those that are named.

    They are measured by what the head would answer to a block's input instead of its output; by how much they turn the
    hidden states, 1 - cosine between a token's before and after, averaged over calibration tokens (Block Influence;
    ShortGPT: Men et al., 2024); or by the loss without them, in a floating search (Pudil et al., 1994). The blocks that
    stay are renumbered, and config.json follows: numbers of layers, lists with an entry for each. The result is proven
    to answer as the model does with those blocks left out. Most of what is lost is won back by training.
    """

    name = "prune-depth"
    not_after = frozenset({"allocate-bits", "sparsify"})
    before_rounding = True
    Params = PruneDepthParams

    def __init__(self, params: PruneDepthParams) -> None:
        super().__init__(params)
        self._measured: dict[str, float] = {}

    def requires(self) -> frozenset[Need]:
        """Return calibration data unless the layers are named."""
        return frozenset() if self.params.layers else frozenset({Need.CALIBRATION})

    def check(self, facts: ModelFacts, target: Target) -> None:  # noqa: ARG002
        """Refuse what leaves nothing, and names of layers that are not there."""
        params, where = self.params, f"pass `{self.name}`"
        if (params.drop is None) == (not params.layers):
            raise UsageError(
                "say how many blocks to take out, or which" if params.drop is None else "`drop` and `layers` are given",
                where=where,
                hint="use one of `drop: 25%` and `layers: [3, 4]`",
            )
        stacks = self._outline_stacks(facts)
        if not stacks:
            raise UsageError(f"`{facts.source}` has no repeated blocks", where=where, hint=f"leave `{self.name}` out")
        if params.stack is not None and not facts.is_encoder_decoder:
            raise UsageError(
                f"`{facts.source}` has one stack of blocks", where=f"{where}: stack {params.stack}", hint="leave it out"
            )
        if len(stacks) > 1 and not facts.is_encoder_decoder:
            raise UsageError(
                f"`{facts.source}` has {len(stacks)} stacks of blocks",
                where=f"{where}: {', '.join(stacks)}; it is no encoder-decoder, whose settings are told apart",
                hint=f"leave `{self.name}` out",
            )
        if params.layers and len(stacks) > 1:
            raise UsageError(
                "these layers are of the encoder or of the decoder?", where=where, hint="say `stack: decoder`"
            )
        if params.by == "loss" and not (facts.is_causal_lm and not params.layers):
            raise UsageError(
                "`by: loss` measures how well a language model predicts text",
                where=f"{where}: {facts.architecture or facts.source} is none" if not params.layers else where,
                hint="use `by: influence`" if not params.layers else "leave it out where layers are named",
            )
        for stack, total in stacks.items():
            wrong = [index for index in params.layers if index >= total]
            if wrong or len(set(params.layers)) != len(params.layers) or len(params.layers) >= total:
                raise UsageError(
                    f"`layers` names {wrong[0]} of `{stack}`, which has {total}"
                    if wrong
                    else "`layers` names a layer twice"
                    if len(set(params.layers)) != len(params.layers)
                    else f"nothing would be left of `{stack}`",
                    where=where,
                    hint=f"layers are counted from 0 to {total - 1}, and one must stay",
                )
            if params.drop is not None:
                amount(params.drop, total, where=f"{where}, `{stack}`")

    def facts_after(self, facts: ModelFacts) -> ModelFacts:
        """Return the outline with fewer blocks, taken to be alike."""
        gone, of = 0, 0
        linears = list(facts.linears)
        for stack, total in self._outline_stacks(facts).items():
            dropped = self._count(total)
            gone, of = gone + dropped, of + total
            linears = [one for one in linears if not _is_at(one.name, stack, total - dropped)]
        share = gone / max(1, facts.blocks)
        inside = facts.bytes - facts.outside_bytes
        lost = share * inside
        return msgspec.structs.replace(
            facts,
            blocks=facts.blocks - gone,
            linears=tuple(linears),
            bytes=int(facts.bytes - lost),
            parameters=int(facts.parameters * (1 - lost / max(1, facts.bytes))),
        )

    def run_block(self, block: Block, linears: Iterable[Linear], context: PassContext) -> PassResult:  # noqa: ARG002
        """Measure what the block does."""
        if self.params.layers or self.params.by == "loss":
            return PassResult()
        if self.params.by == "answers":
            self._measured[block.name] = block.absence()
            return PassResult()
        from .numerics.influence import Influence

        influence = Influence()
        for batch in range(block.batches):
            influence.add(block.input(batch), block.output(batch))
        self._measured[block.name] = influence.mean
        return PassResult()

    def findings(self) -> dict[str, float]:
        """Return the figure of each block."""
        return dict(self._measured)

    def take_up(self, findings: dict[str, float]) -> None:
        """Go on with figures of the first blocks."""
        self._measured = dict(findings)

    def conclude(self, model: ModelHandle, context: PassContext) -> tuple[ModelHandle, PassResult]:
        """Take out the blocks."""
        stacks = [list(stack) for stack in model.blocks() if self._wants(stack[0], model.facts)]
        result = PassResult()
        if self.params.layers:
            dropped = [stack[index] for stack in stacks for index in sorted(self.params.layers)]
        elif self.params.by == "loss":
            dropped = self._by_loss(model, stacks[0], context, result)
        else:
            for name, value in self._measured.items():
                unit = "influence_ratio" if self.params.by == "influence" else "answers_moved_nats"
                result.layers[name] = {unit: value}
            dropped = [
                stack[index]
                for stack in stacks
                for index in lowest([self._measured[name] for name in stack], self._count(len(stack)))
            ]
        shorter = model.without_blocks(dropped, seed=context.seed)
        result.changed = dropped
        result.metrics["dropped_blocks_count"] = len(dropped)
        result.notes.append(
            f"took out {', '.join(dropped)}: {sum(map(len, model.blocks())) - len(dropped)} blocks left"
        )
        self._measured = {}
        return shorter, result

    def _by_loss(self, model: ModelHandle, stack: list[str], context: PassContext, result: PassResult) -> list[str]:
        """Take out one block after another, the one whose absence costs least; then look at each of them again.

        One that was right when it went may not be beside those that went after it: each is put back in turn, and the
        one goes in its place that now costs least, until no exchange lowers the loss.
        """
        count = self._count(len(stack))
        rounds = sum(len(stack) - done for done in range(count)) + (count * (len(stack) - count) if count > 1 else 0)
        dropped: list[str] = []
        lowest_loss = math.inf
        with context.reporter.step("loss without each block", rounds) as step:

            def cheapest(gone: list[str], stays: str | None = None) -> tuple[float, str]:
                tried: list[tuple[float, str]] = []
                for name in stack:
                    if name not in gone and name != stays:
                        tried.append((model.loss_without([*gone, name], context.rows), name))
                        step.advance(detail=name)
                return min(tried)

            while len(dropped) < count:
                lowest_loss, name = cheapest(dropped)
                dropped.append(name)
                result.layers[name] = {"loss_without_nats": lowest_loss}
            waiting = list(dropped) if count > 1 else []
            while waiting:
                others = [name for name in dropped if name != waiting[0]]
                loss, name = cheapest(others, stays=waiting[0])
                if loss < lowest_loss:
                    result.notes.append(f"{name} instead of {waiting[0]}: {lowest_loss:.4f} to {loss:.4f} nats")
                    del result.layers[waiting[0]]
                    lowest_loss = loss
                    result.layers[name] = {"loss_without_nats": loss}
                    dropped, waiting = [*others, name], others
                else:
                    waiting.pop(0)
        return sorted(dropped, key=stack.index)

    def _count(self, total: int) -> int:
        if self.params.layers:
            return len(self.params.layers)
        assert self.params.drop is not None, "check() has seen it"
        return amount(self.params.drop, total, where=f"pass `{self.name}`")

    def _wants(self, name: str, facts: ModelFacts) -> bool:
        """Return whether blocks of the stack in which `name` lies are taken out."""
        return not facts.is_encoder_decoder or self.params.stack is None or self.params.stack in name

    def _outline_stacks(self, facts: ModelFacts) -> dict[str, int]:
        """Return the stacks that lose blocks, as the checkpoint calls them, and how many blocks each has."""
        found: dict[str, int] = {}
        for match in (_NUMBER.match(linear.name) for linear in facts.linears):
            if match is not None and self._wants(match[1], facts):
                found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
        return found


def _is_at(name: str, stack: str, first: int) -> bool:
    """Return whether layer `name` lies in block `first` of `stack` or in a later one."""
    match = _NUMBER.match(name)
    return match is not None and match[1] == stack and int(match[2]) >= first
