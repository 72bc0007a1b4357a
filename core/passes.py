"""The contract of a pass. One file in passes/, one class, one line in the registry.

The runner, not the author, enforces it: it checks `needs` and `not_after` in the plan, calls `check` before anything
heavy is imported, and after the run that every name in `changed` exists and that the new weights are finite.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Generic, Literal, NamedTuple, TypeVar

from .facts import ModelFacts
from .model import Block, Linear, ModelHandle
from .params import Params
from .progress import Reporter, Silent
from .quantized import Grid
from .target import Target

P = TypeVar("P", bound=Params)


class Need(StrEnum):
    """What a pass cannot work without."""

    CALIBRATION = "calibration"
    GRADIENTS = "gradients"
    TEACHER = "teacher"


class Skip(NamedTuple):
    """Something that was left as it was, and why."""

    name: str
    reason: str


@dataclass(slots=True)
class PassResult:
    """What a pass did.

    Attributes:
        changed: names of the layers or tensors that are different now.
        skipped: those it left alone although they were candidates.
        metrics: figures, each name ending in its unit (`layers_count`, `damping_max_ratio`).
        notes: sentences the user should read, such as a numerical trouble that was met.
    """

    changed: list[str] = field(default_factory=list[str])
    skipped: list[Skip] = field(default_factory=list[Skip])
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    notes: list[str] = field(default_factory=list[str])

    def absorb(self, other: PassResult) -> None:
        """Add what the same pass did to a further block; metrics named `…_max_…` take the maximum, others add up."""
        self.changed += other.changed
        self.skipped += other.skipped
        self.notes += other.notes
        for name, value in other.metrics.items():
            known = self.metrics.get(name)
            if known is None:
                self.metrics[name] = value
            else:
                self.metrics[name] = max(known, value) if "_max_" in name else known + value


@dataclass(frozen=True, slots=True)
class PassContext:
    """What a pass may use beside the model."""

    seed: int = 0
    target: Target = Target.CPU
    reporter: Reporter = field(default_factory=Silent)


class Pass(Generic[P]):
    """A step of a recipe."""

    name: ClassVar[str]
    accepts: ClassVar[Literal["torch", "onnx"]] = "torch"
    needs: ClassVar[frozenset[Need]] = frozenset()
    not_after: ClassVar[frozenset[str]] = frozenset()
    Params: ClassVar[type[Params]]

    def __init__(self, params: P) -> None:
        self.params = params

    def check(self, facts: ModelFacts, target: Target) -> None:
        """Refuse what cannot work, from the outline alone.

        Raises:
            UsageError: these parameters cannot be used on this model or target.
        """

    def grid(self) -> Grid | None:
        """Return the grid on which the pass puts weights, None if it leaves them in floating point."""
        return None

    def ignored(self) -> tuple[str, ...]:
        """Return the patterns of layers that the pass leaves alone."""
        return ()


class ModelPass(Pass[P]):
    """A pass that takes the whole model at once."""

    def run(self, model: ModelHandle, context: PassContext) -> tuple[ModelHandle, PassResult]:
        """Return the changed model and what was done."""
        raise NotImplementedError


class BlockPass(Pass[P]):
    """A pass that works block by block. Neighbouring block passes share one sweep over the model."""

    def run_block(self, block: Block, linears: Iterable[Linear], context: PassContext) -> PassResult:
        """Work on `linears` of `block` (those that `ignored()` does not name)."""
        raise NotImplementedError
