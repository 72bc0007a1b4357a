"""One sweep over the blocks, in which every block pass of a group has its turn.

Load a block, run every pass on it, propagate the outputs of the finished block to the next, write what was made of it,
free it. The runner, not the pass, sees to the contract: only the block's own layers change, and to finite weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import msgspec
import torch

from ..core.block import Linear
from ..core.errors import LlmoptError, UsageError
from ..core.passes import BlockPass, Need, PassContext, PassResult, Skip, SurveyPass
from ..core.plan import Limits
from ..core.quantized import Grid, QuantizedWeight
from ..models.blocks import LoadedBlock, loaded
from ..models.handle import TorchModel
from ..models.outside import outside_on_demand
from ..models.replay import Replay
from ..models.saved import relative
from ..models.skeleton import BlockSite, Skeleton
from ..models.states import States
from ..models.store import StoredFile
from ..models.text import batches
from .cache.blocks_done import BlocksDone, Finished


def run_sweep(
    model: TorchModel,
    passes: Sequence[BlockPass[Any]],
    rows: Sequence[Sequence[int]],
    context: PassContext,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    *,
    done: BlocksDone | None = None,
) -> list[PassResult]:
    """Run block passes over all blocks; what they make goes to the model's store.

    Args:
        model: the model.
        passes: in order.
        rows: calibration samples as token ids; empty when no pass needs them.
        context: seed, target, reporter.
        limits: batches of the samples, and how much of their hidden states stays in memory.
        done: where finished blocks are written down; those that are there already are not worked on again.

    Returns:
        For each pass, what it did.
    """
    return _Sweep(model, passes, rows, context, limits, done=done).run()


class _Sweep:
    """One sweep; see `run_sweep`."""

    def __init__(
        self,
        model: TorchModel,
        passes: Sequence[BlockPass[Any]],
        rows: Sequence[Sequence[int]],
        context: PassContext,
        limits: Limits,
        *,
        done: BlocksDone | None,
    ) -> None:
        self._model, self._passes, self._context, self._done = model, passes, context, done
        self._former = [] if done is None else done.finished
        if done is not None:
            for one in self._former:
                _take_up(model, one, done.folder)
        self._skeleton = model.skeleton()
        self._results = [PassResult() for _ in passes]
        self._tokens: list[int] = []
        self._states: States | None = None
        self._replay: Replay | None = None
        self._exact: Replay | None = None
        if any(Need.CALIBRATION in one.requires() for one in passes):
            self._states = _states(model, limits, done)
            self._replay = _replay(self._skeleton, rows, limits, self._states)
        if any(Need.EXACT_INPUTS in one.requires() for one in passes):
            own = len(self._skeleton.stacks)  # the numbers before are those of the blocks that are rounded
            self._exact = _replay(self._skeleton, rows, limits, self._states, first_stack=own)
        if self._former:
            self._go_on(self._former)

    def run(self) -> list[PassResult]:
        """Work on the blocks that are left, and return what each pass did."""
        skeleton, count = self._skeleton, len(self._former)
        title = " + ".join(one.name for one in self._passes)
        left = skeleton.sites[count:]
        with (
            self._context.reporter.step(title, len(skeleton.sites)) as step,
            outside_on_demand(skeleton, self._model.read),
        ):
            if self._former:
                step.advance(count, detail=self._former[-1].block)
            for site, following in zip_longest(left, left[1:]):
                self._block(site, following)
                step.advance(detail=site.name)
        if self._done is not None:
            self._done.settle()
        if self._tokens:
            calibrated = [Need.CALIBRATION in one.requires() for one in self._passes].index(True)
            _tell_experts(self._results[calibrated], self._tokens)
        for one, result in zip(self._passes, self._results, strict=True):
            if Need.UNROUNDED in one.requires() and not self._model.store.adapted:
                raise _no_adapter(one, result)
        return self._results

    @property
    def _replays(self) -> list[Replay]:
        return [replay for replay in (self._replay, self._exact) if replay is not None]

    def _go_on(self, former: Sequence[Finished]) -> None:
        """Take up what an earlier run had found when it was killed."""
        for one in former:
            _absorb(self._results, one.results)
            self._tokens += one.tokens
        if self._states is not None:
            self._states.take_up({(file.stack, file.batch): file for file in former[-1].states})
            for replay in self._replays:
                replay.take_up(self._skeleton.sites[: len(former)])
        first = self._passes[0]
        if isinstance(first, SurveyPass):
            first.take_up(former[-1].findings)

    def _block(self, site: BlockSite, following: BlockSite | None) -> None:
        """Run every pass on a block, and let its outputs be the next one's inputs."""
        begun = time.monotonic()
        skeleton, model, done = self._skeleton, self._model, self._done
        if following is not None:
            model.checkpoint.prefetch(skeleton.naming.sources_of(following.parameters))
        unrounded = any(Need.UNROUNDED in one.requires() for one in self._passes)
        with loaded(skeleton, site, model, self._replay, unrounded=unrounded, exact=self._exact) as block:
            made = [_run(one, block, self._context) for one in self._passes]
            _absorb(self._results, made)
            if done is not None:
                done.settle()
            if following is not None:
                self._finish(block, site)
            self._tokens += block.expert_tokens.values()
            file = _put(model, block)
            if done is not None:
                self._write_down(done, block, made, file, time.monotonic() - begun)

    def _finish(self, block: LoadedBlock, site: BlockSite) -> None:
        """Let what the finished block returns be the next one's inputs."""
        first = any(site is stack[0] for stack in self._skeleton.stacks)
        if self._replay is not None:
            self._replay.finish(site, first=first)
        if self._exact is not None:
            with block.computing_unrounded():
                self._exact.finish(site, first=first)

    def _write_down(
        self, done: BlocksDone, block: LoadedBlock, made: list[PassResult], file: StoredFile | None, seconds: float
    ) -> None:
        """Write down a finished block, unless the disk was too full for a part of it."""
        outside = file is not None and not Path(file.path).is_relative_to(done.folder)
        if outside or (self._states is not None and not self._states.lasting):
            done.stopped = True
            return
        first = self._passes[0]
        done.add(
            Finished(
                block=block.name,
                seconds=seconds,
                file=None if file is None else relative(file, done.folder),
                record=None,
                results=made,
                inputs=dict(block.inputs),
                caches=dict(block.caches),
                sparse=sorted(block.sparse),
                tokens=list(block.expert_tokens.values()),
                findings=first.findings() if isinstance(first, SurveyPass) else None,
                states=[] if self._states is None else self._states.files,
            )
        )


def _absorb(results: Sequence[PassResult], made: Sequence[PassResult]) -> None:
    """Add what the passes did to a further block."""
    for result, here in zip(results, made, strict=True):
        result.absorb(here)


def _put(model: TorchModel, block: LoadedBlock) -> StoredFile | None:
    """Write what was made of a block, and note it in the model's store."""
    changed = {name: stored() for name, stored in block.changed.items()}
    model.store.inputs.update(block.inputs)
    model.store.caches.update(block.caches)
    model.store.sparse |= block.sparse
    return model.store.put(
        block.name, block.results, transposed=block.transposed, changed=changed, factors=block.factors
    )


def _take_up(model: TorchModel, finished: Finished, folder: Path) -> None:
    """Put into the model's store what an earlier run has made of a block."""
    store = model.store
    if finished.file is not None:
        store.add(msgspec.structs.replace(finished.file, path=str(folder / finished.file.path)))
    store.skip(1)
    store.inputs.update(finished.inputs)
    store.caches.update(finished.caches)
    store.sparse.update(finished.sparse)


def _tell_experts(result: PassResult, tokens: Sequence[int]) -> None:
    """Say how many calibration tokens the experts of a mixture saw."""
    least, median, most = min(tokens), statistics.median_low(tokens), max(tokens)
    result.metrics |= {
        "expert_tokens_least_count": least,
        "expert_tokens_median_count": median,
        "expert_tokens_most_count": most,
    }
    result.notes.append(f"experts saw {least} to {most} calibration tokens, median {median}")


def _states(model: TorchModel, limits: Limits, done: BlocksDone | None) -> States:
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(model.facts.dtype, torch.float32)
    folder = None if limits.states_bytes is None else model.store.folder
    if done is None:
        return States(dtype, folder, limits.states_bytes)
    return States(dtype, done.folder, limits.states_bytes, lasting=True)


def _replay(
    skeleton: Skeleton, rows: Sequence[Sequence[int]], limits: Limits, states: States | None, *, first_stack: int = 0
) -> Replay:
    if skeleton.model.main_input_name != "input_ids":
        raise UsageError(
            f"{type(skeleton.model).__name__} takes {skeleton.model.main_input_name}, calibration data is text",
            hint="use rtn, which needs no calibration data",
        )
    decoder = skeleton.has_decoder
    inputs = batches(rows, decoder=decoder, tokens=limits.batch_tokens)
    return Replay(skeleton, inputs, states, first_stack=first_stack)


def _run(one: BlockPass[Any], block: LoadedBlock, context: PassContext) -> PassResult:
    skips: list[Skip] = []
    chosen: list[Linear] = []
    for linear in block.linears:
        reason = one.left_alone(linear.name)
        if reason is None and _of_rounded(one) and linear not in block.results:
            reason = "its weight stays in floating point"
        if reason is None:
            chosen.append(linear)
            _check_grid(one, linear, one.grid_for(linear.name, context.allocation))
        else:
            skips.append(Skip(linear.name, reason))
    before = dict(block.results)
    result = one.run_block(block, chosen, context)
    result.skipped = [*skips, *result.skipped]
    _check(one, block, result, before)
    for linear, weight in block.results.items():
        if before.get(linear) is not weight:
            result.layers[linear.name] = _figures(block, linear, weight)
    return result


def _no_adapter(one: BlockPass[Any], result: PassResult) -> LlmoptError:
    reasons = dict.fromkeys(skip.reason for skip in result.skipped)
    return LlmoptError(
        "no layer takes an adapter",
        where=f"pass `{one.name}`: {'; '.join(reasons)}",
        hint=f"name other layers, or leave `{one.name}` out",
    )


def _of_rounded(one: BlockPass[Any]) -> bool:
    """Return whether a pass works on layers that an earlier one has rounded."""
    return one.input_grid() is not None or Need.UNROUNDED in one.requires()


def _figures(block: LoadedBlock, linear: Linear, weight: QuantizedWeight) -> dict[str, float]:
    bits = weight.grid.bits_per_weight(*weight.shape, scale_bits=8 * weight.scale.itemsize)
    return {
        "weights": weight.codes.numel(),
        "bits": weight.bits,
        "bits_per_weight": float(f"{bits:.4g}"),
        "relative_error": block.errors[linear],
    }


def _check_grid(one: BlockPass[Any], linear: Linear, grid: Grid | None) -> None:
    """Catch what the shard headers did not show, such as experts stored in one 3-D tensor."""
    if grid is not None and not grid.divides(linear.in_features, linear.out_features):
        raise UsageError(
            f"cannot group `{linear.name}`",
            where=f"pass `{one.name}`: its {linear.in_features} input features are not a multiple of the group size",
            hint=f'use --group-size channel, or leave it out with --ignore "*.{linear.name.rpartition(".")[2]}"',
        )


def _check(
    one: BlockPass[Any], block: LoadedBlock, result: PassResult, before: Mapping[Linear, QuantizedWeight]
) -> None:
    known = {linear.name: linear for linear in block.linears}
    for name in result.changed:
        if name not in known:
            raise LlmoptError(f"pass `{one.name}` says it changed `{name}`, which is not in {block.name}")
        quantized = block.results.get(known[name])
        made = block.weight(known[name]) if quantized is None else quantized.scale
        if not bool(torch.isfinite(made).all()):
            raise LlmoptError(
                f"pass `{one.name}` made NaN or Inf in `{name}`",
                hint="leave the layer out with --ignore, and report this as a defect",
            )
    quantized_now = {linear.name for linear, weight in block.results.items() if before.get(linear) is not weight}
    untold = quantized_now - set(result.changed)
    if untold:
        raise LlmoptError(f"pass `{one.name}` changed {', '.join(sorted(untold))} without saying so")
