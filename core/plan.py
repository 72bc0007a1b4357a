"""What a recipe will do to one model, worked out before anything heavy is imported."""

from __future__ import annotations

from typing import Any

import msgspec

from .facts import ModelFacts
from .reads import Read
from .recipe import Recipe


class PlanStep(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the plan.

    Attributes:
        kind: "pass", "sweep" (several block passes together), "graph" (a pass on the graph), "export" or "verify".
        title: the pass or export, or the passes of a sweep joined by " + ".
        detail: its parameters and what it covers, in words.
    """

    kind: str
    title: str
    detail: str


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What keeps the memory of a run down.

    Attributes:
        batch_tokens: calibration tokens that run through a block at a time.
        statistics_bytes: how much of a mixture's experts' statistics is gathered at a time.
        states_bytes: how much of the samples' hidden states stays in memory, the rest on disk; None keeps them all.
    """

    batch_tokens: int = 2048
    statistics_bytes: int = 4 << 30
    states_bytes: int | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The checked plan.

    Attributes:
        recipe: what was asked for.
        facts: the source model's outline.
        steps: what will be done, in order.
        skips: (name, reason) of what will be left out.
        peak_bytes: estimated peak memory of the process in bytes.
        output_bytes: estimated size of all exports together.
        limits: what keeps the peak there.
        reads: every file that will be read.
    """

    recipe: Recipe
    facts: ModelFacts
    steps: tuple[PlanStep, ...]
    skips: tuple[tuple[str, str], ...]
    peak_bytes: int
    output_bytes: int
    limits: Limits = Limits()
    reads: tuple[Read, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Render for `--json`; the layers are counted, not listed."""
        return {
            "recipe": self.recipe.to_dict(),
            "model": {
                "source": self.facts.source,
                "architecture": self.facts.architecture,
                "model_type": self.facts.model_type,
                "dtype": self.facts.dtype,
                "parameters": self.facts.parameters,
                "bytes": self.facts.bytes,
                "blocks": self.facts.blocks,
                "linears": len(self.facts.linears),
            },
            "steps": [msgspec.to_builtins(step) for step in self.steps],
            "skips": [list(skip) for skip in self.skips],
            "peak_bytes": self.peak_bytes,
            "output_bytes": self.output_bytes,
        }
