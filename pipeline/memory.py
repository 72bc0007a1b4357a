"""How much memory a plan will take at its peak, and how it is kept below a limit.

What is in memory at once follows the largest block and the widest layer, not the model; only the calibration samples'
hidden states grow with what is asked for. They can go to disk, and the samples can come in smaller batches: those two
are what a limit decides. Everything else is what the work needs at least.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from ..core.errors import UsageError
from ..core.facts import ModelFacts
from ..core.passes import BlockPass, Need
from ..core.plan import Limits
from ..core.recipe import CalibrationSpec
from ..models.checkpoint import DTYPES
from .steps import AnyExporter, AnyPass

WHOLE_BYTES = 1 << 30
"""A model of more bytes than this in float32 is verified block by block in transformers: opening it whole would take
several times the memory that making it took."""

_INTERPRETER = 400 << 20
_TEXT = 64 << 20
_LOADER = 64 << 20
"""Resident memory of Python with torch, transformers and compressed-tensors imported and a model's modules built, what
a tokenizer and calibration text add, and what transformers adds as it opens a model: measured with Python 3.11, torch
2.13 and transformers 5.23 on Linux."""

_MARGIN = 0.88
"""The share of a limit that is planned with: measured peaks were up to 11 % above their estimates, that one with small
batches under a tight limit."""

_BATCHES = (2048, 1024, 512, 256)
"""Tokens that run through a block at a time: the most that a limit leaves room for."""

_STATISTICS = (4 << 30, 1 << 30, 256 << 20, 0)
"""What the Hessians of a mixture's experts may take at once; a forward pass more for each further part."""

_ROWS = 2048
"""Rows of a weight that a pass works on at a time."""

_ACTIVATIONS = 6
"""How many inputs of the widest layer are in memory at once while a block computes."""

_DEQUANTIZED = 4
"""Bytes of a weight, beside its place in the block, while it is dequantized."""

_SPECTRUM = 32
"""Bytes for each number of a matrix whose eigenvectors are found: in float64 itself, they, and LAPACK's work space."""

_LOGITS = 4 * (1 << 23)
_FLOAT = 4
_WIDTHS = dict(DTYPES.values())


class Phase(NamedTuple):
    """What a part of the work holds in memory at its peak, the interpreter and hidden states not counted."""

    words: str
    nbytes: int


class Estimate(NamedTuple):
    """The peak memory of the whole process, and the limits that keep it there."""

    peak_bytes: int
    limits: Limits


def estimate(
    facts: ModelFacts,
    passes: Sequence[AnyPass],
    exporters: Sequence[AnyExporter],
    calibration: CalibrationSpec | None,
    max_memory: int | None = None,
) -> Estimate:
    """Estimate the peak; with `max_memory`, choose the batches and what goes to disk so that it stays below.

    Raises:
        UsageError: it cannot; the message says how much is needed at least.
    """
    base = _INTERPRETER + (0 if calibration is None else _TEXT)
    calibrated = calibration is not None and _needed(passes, Need.CALIBRATION)
    tokens = calibration.samples * calibration.length if calibration is not None and calibrated else 0
    ways = 2 if _needed(passes, Need.EXACT_INPUTS) else 1  # through the blocks: rounded, and not
    states = ways * tokens * _hidden(facts) * min(_FLOAT, _WIDTHS[facts.dtype])
    others = max(
        [*_exports(facts, exporters), _verification(facts), *_whole(facts, passes)], key=lambda phase: phase.nbytes
    )
    choices = [Limits(batch_tokens=batch, statistics_bytes=share) for share in _STATISTICS for batch in _BATCHES]
    sweeps = [_sweep(facts, passes, min(limits.batch_tokens, tokens), limits.statistics_bytes) for limits in choices]
    if max_memory is None:
        return Estimate(base + max(others.nbytes, sweeps[0].nbytes + states), choices[0])
    available = int(max_memory * _MARGIN) - base
    least = max(others, sweeps[-1], key=lambda phase: phase.nbytes)
    if least.nbytes > available:
        raise _too_little(least, base, max_memory)
    sweep, limits = next(pair for pair in zip(sweeps, choices, strict=True) if pair[0].nbytes <= available)
    room = available - sweep.nbytes
    peak = base + max(others.nbytes, sweep.nbytes + min(states, room))
    return Estimate(peak, msgspec.structs.replace(limits, states_bytes=room))


def _too_little(least: Phase, base: int, max_memory: int) -> UsageError:
    needed = (base + least.nbytes) / _MARGIN
    return UsageError(
        f"at least {_gib(needed)} of memory are needed, {_gib(max_memory)} are allowed",
        where=f"{least.words}: {_gib(least.nbytes)}; Python, its libraries and the text: {_gib(base)}",
        hint=f"use --max-memory {needed / 2**30 + 0.005:.2f}GiB or more",
    )


def _sweep(facts: ModelFacts, passes: Sequence[AnyPass], tokens: int, statistics: int) -> Phase:
    """Return the peak of working on the largest block, `tokens` of the calibration samples at a time.

    Args:
        facts: the model.
        passes: all of them.
        tokens: in a batch; 0 without calibration.
        statistics: what the Hessians of a mixture's experts may take at once.
    """
    width = _WIDTHS[facts.dtype]
    block = facts.largest_block_bytes // width
    largest, widest = _largest(facts), max((linear.in_features for linear in facts.linears), default=0)
    if not any(isinstance(one, BlockPass) for one in passes):
        return Phase("no block is worked on", 0)
    kept, spectrum, drift = 0, 0, 0
    if _needed(passes, Need.UNROUNDED):
        kept = block * width
        spectrum = _SPECTRUM * max((min(one.in_features, one.out_features) for one in facts.linears), default=0) ** 2
    if not tokens:  # the layer that is rounded, and the block's codes, which are copied to be written
        return Phase("the largest block", largest * width + 2 * block + kept + spectrum)
    hessian = _FLOAT * widest**2
    if _needed(passes, Need.EXACT_INPUTS):
        kept, drift = block * width, hessian
    hessians = max(hessian, min(statistics, _expert_bytes(facts)))
    collecting = hessians + drift + _ACTIVATIONS * _FLOAT * tokens * widest
    rounding = hessians + drift + hessian + 10 * min(_ROWS, largest // max(1, widest)) * widest
    held = (_FLOAT + 1) * block + kept + min(facts.outside_bytes, _embedding(facts) * width)
    most = max(collecting, rounding, hessians + spectrum)
    return Phase(f"the largest block, its codes and the Hessian of {widest} inputs", held + most)


def _needed(passes: Sequence[AnyPass], need: Need) -> bool:
    return any(need in one.requires() for one in passes)


def _exports(facts: ModelFacts, exporters: Sequence[AnyExporter]) -> list[Phase]:
    whole = facts.parameters * _FLOAT
    return [
        Phase(f"export `{exporter.name}` holds the whole model", 2 * whole)
        for exporter in exporters
        if exporter.runtime != "transformers"
    ]


def _whole(facts: ModelFacts, passes: Sequence[AnyPass]) -> list[Phase]:
    held = {one.name: one.whole_bytes(facts) for one in passes}
    return [Phase(f"pass `{name}` holds the whole model", nbytes) for name, nbytes in held.items() if nbytes]


def _verification(facts: ModelFacts) -> Phase:
    width = _WIDTHS[facts.dtype]
    if facts.parameters * _FLOAT <= WHOLE_BYTES:
        return Phase("opening the artifact again", facts.parameters * (_FLOAT + width + 1) + _LOGITS + _LOADER)
    block = facts.largest_block_bytes // width * _FLOAT + _DEQUANTIZED * _largest(facts)
    head = _embedding(facts) * width
    return Phase("computing the largest block to verify it", max(block, head) + _LOGITS)


def _expert_bytes(facts: ModelFacts) -> int:
    """Return the bytes of the Hessians of all experts of a block."""
    alike = Counter(
        (re.sub(r"\.experts\.\d+\.", ".experts.*.", linear.name), linear.in_features) for linear in facts.linears
    )
    return max((count * _FLOAT * width**2 for (_, width), count in alike.items()), default=0)


def _largest(facts: ModelFacts) -> int:
    return max((linear.out_features * linear.in_features for linear in facts.linears), default=0)


def _hidden(facts: ModelFacts) -> int:
    return min((linear.in_features for linear in facts.linears), default=0)


def _embedding(facts: ModelFacts) -> int:
    """Return the weights of the embedding, as far as config.json tells."""
    text = facts.config.get("text_config") or facts.config
    return int(text.get("vocab_size") or 0) * _hidden(facts)


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
