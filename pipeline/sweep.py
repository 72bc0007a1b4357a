"""One sweep over the blocks, in which every block pass of a group has its turn.

Load a block, run every pass on it, propagate the outputs of the finished block to the next, write what was made of it,
free it. The runner, not the pass, sees to the contract: only the block's own layers change, and to finite weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch

from ..core.errors import LlmoptError, UsageError
from ..core.model import Linear
from ..core.passes import BlockPass, Need, PassContext, PassResult, Skip
from ..core.plan import Limits
from ..core.quantized import Grid, QuantizedWeight
from ..models.blocks import LoadedBlock, loaded
from ..models.handle import TorchModel
from ..models.outside import outside_on_demand
from ..models.replay import Replay
from ..models.skeleton import Skeleton
from ..models.states import States
from ..models.text import batches


def run_sweep(
    model: TorchModel,
    passes: Sequence[BlockPass[Any]],
    rows: Sequence[Sequence[int]],
    context: PassContext,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
) -> list[PassResult]:
    """Run block passes over all blocks; what they make goes to the model's store.

    Args:
        model: the model.
        passes: in order.
        rows: calibration samples as token ids; empty when no pass needs them.
        context: seed, target, reporter.
        limits: batches of the samples, and how much of their hidden states stays in memory.

    Returns:
        For each pass, what it did.
    """
    skeleton = model.skeleton()
    calibrated = any(Need.CALIBRATION in one.requires() for one in passes)
    replay = _replay(model, skeleton, rows, limits) if calibrated else None
    results = [PassResult() for _ in passes]
    title = " + ".join(one.name for one in passes)
    last = skeleton.sites[-1]
    tokens: list[int] = []
    with context.reporter.step(title, len(skeleton.sites)) as step, outside_on_demand(skeleton, model.read):
        for stack in skeleton.stacks:
            for site, following in zip_longest(stack, stack[1:]):
                if following is not None:
                    model.checkpoint.prefetch(skeleton.naming.sources_of(following.parameters))
                with loaded(skeleton, site, model, replay) as block:
                    for one, result in zip(passes, results, strict=True):
                        result.absorb(_run(one, block, context))
                    if replay is not None and site is not last:
                        replay.finish(site, first=site is stack[0])
                    changed = {name: stored() for name, stored in block.changed.items()}
                    model.store.inputs.update(block.inputs)
                    model.store.caches.update(block.caches)
                    model.store.sparse |= block.sparse
                    tokens += block.expert_tokens.values()
                    model.store.put(block.name, block.results, transposed=block.transposed, changed=changed)
                step.advance(detail=site.name)
    if tokens:
        _tell_experts(results[[Need.CALIBRATION in one.requires() for one in passes].index(True)], tokens)
    return results


def _tell_experts(result: PassResult, tokens: Sequence[int]) -> None:
    """Say how many calibration tokens the experts of a mixture saw."""
    least, median, most = min(tokens), statistics.median_low(tokens), max(tokens)
    result.metrics |= {
        "expert_tokens_least_count": least,
        "expert_tokens_median_count": median,
        "expert_tokens_most_count": most,
    }
    result.notes.append(f"experts saw {least} to {most} calibration tokens, median {median}")


def _replay(model: TorchModel, skeleton: Skeleton, rows: Sequence[Sequence[int]], limits: Limits) -> Replay:
    if skeleton.model.main_input_name != "input_ids":
        raise UsageError(
            f"{type(skeleton.model).__name__} takes {skeleton.model.main_input_name}, calibration data is text",
            hint="use rtn, which needs no calibration data",
        )
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(model.facts.dtype, torch.float32)
    decoder = skeleton.has_decoder
    inputs = batches(rows, decoder=decoder, tokens=limits.batch_tokens)
    folder = None if limits.states_bytes is None else model.store.folder
    return Replay(skeleton, inputs, States(dtype, folder, limits.states_bytes or 0))


def _run(one: BlockPass[Any], block: LoadedBlock, context: PassContext) -> PassResult:
    skips: list[Skip] = []
    chosen: list[Linear] = []
    for linear in block.linears:
        reason = one.left_alone(linear.name)
        if reason is None and one.input_grid() is not None and linear not in block.results:
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
