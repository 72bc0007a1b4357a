"""The contract of a pass. One file in passes/, one class, one line in the registry.

The runner, not the author, enforces it: it checks `needs` and `not_after` in the plan, calls `check` before anything
heavy is imported, and after the run that every name in `changed` exists and that the new weights are finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

from .activations import ActivationGrid, ActivationNumber
from .adapter import AdapterShape
from .block import Block, Linear
from .facts import ModelFacts
from .graph import GraphModel
from .model import ModelHandle
from .params import Params
from .patterns import matches
from .progress import Reporter, Silent
from .quantized import Grid
from .reads import Input
from .target import Target
from .text import TextRequest, TextRows

P = TypeVar("P", bound=Params)


class Need(StrEnum):
    """What a pass cannot work without."""

    CALIBRATION = "calibration"
    GRADIENTS = "gradients"
    TEACHER = "teacher"
    UNROUNDED = "weights as they were before they were rounded"
    EXACT_INPUTS = "the inputs that layers have while nothing is rounded"


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
        layers: figures of single layers or blocks, by name: `bits` and `relative_error` of what was rounded, which the
            runner adds, and what the pass itself measured.
        weight_bytes: bytes of the model's weights after the pass, which the runner adds; None where that is not known.
        notes: sentences the user should read, such as a numerical trouble that was met.
        allocation: bits per weight by layer, for the pass that quantizes them later.
        vocabulary: the tokens that are left, by their new ids, as the ids they had; None where ids did not change.
        curve: points of what was measured while the pass learnt, each with its `step`.
    """

    changed: list[str] = field(default_factory=list[str])
    skipped: list[Skip] = field(default_factory=list[Skip])
    metrics: dict[str, int | float] = field(default_factory=dict[str, int | float])
    notes: list[str] = field(default_factory=list[str])
    allocation: dict[str, int] = field(default_factory=dict[str, int])
    vocabulary: list[int] | None = None
    curve: list[dict[str, int | float]] = field(default_factory=list[dict[str, int | float]])
    layers: dict[str, dict[str, int | float]] = field(default_factory=dict[str, dict[str, int | float]])
    weight_bytes: int | None = None

    def absorb(self, other: PassResult) -> None:
        """Add what the same pass did to a further block; metrics named `…_max_…` take the maximum, others add up."""
        self.changed += other.changed
        self.skipped += other.skipped
        self.notes += other.notes
        self.allocation.update(other.allocation)
        self.curve += other.curve
        for name, figures in other.layers.items():
            self.layers[name] = self.layers.get(name, {}) | figures
        for name, value in other.metrics.items():
            known = self.metrics.get(name)
            if known is None:
                self.metrics[name] = value
            else:
                self.metrics[name] = max(known, value) if "_max_" in name else known + value


@dataclass(frozen=True, slots=True)
class PassContext:
    """What a pass may use beside the model.

    Attributes:
        seed: of everything that is drawn at random.
        target: what the artifact is for.
        reporter: shown progress.
        allocation: bits per weight by layer, as an earlier pass chose them.
        statistics_bytes: what is gathered of a mixture's experts takes at most this much at a time.
        rows: calibration samples as token ids, for a pass that takes the whole model; empty where none were asked for.
        teacher: the model to learn from, for a pass that needs `Need.TEACHER`.
        teacher_ids: for each token id of the model the one that the teacher has for the same string, -1 where it has
            none; None where both have the same vocabulary.
        text: what `Pass.text` asked for.
        work: a folder for what the pass needs on disk while it runs.
        checkpoints: a folder that outlives a run that is killed, for this pass with these parameters on this model
            alone; None where nothing is kept.
    """

    seed: int = 0
    target: Target = Target.CPU
    reporter: Reporter = field(default_factory=Silent)
    allocation: Mapping[str, int] = field(default_factory=dict[str, int])
    statistics_bytes: int = 4 << 30
    rows: Sequence[Sequence[int]] = ()
    teacher: ModelHandle | None = None
    teacher_ids: Sequence[int] | None = None
    text: TextRows | None = None
    work: Path | None = None
    checkpoints: Path | None = None


class Pass(Generic[P]):
    """A step of a recipe."""

    name: ClassVar[str]
    accepts: ClassVar[Literal["torch", "onnx"]] = "torch"
    needs: ClassVar[frozenset[Need]] = frozenset()
    not_after: ClassVar[frozenset[str]] = frozenset()
    before_rounding: ClassVar[bool] = False
    """Whether it changes weights, and so cannot come after a pass whose `grid()` they were put on."""
    Params: ClassVar[type[Params]]

    def __init__(self, params: P) -> None:
        self.params = params

    def requires(self) -> frozenset[Need]:
        """Return what the pass cannot work without: `needs`, unless the parameters decide."""
        return self.needs

    def check(self, facts: ModelFacts, target: Target) -> None:
        """Refuse what cannot work, from the outline alone.

        Raises:
            UsageError: these parameters cannot be used on this model or target.
        """

    def check_earlier(self, earlier: Sequence[Pass[Any]]) -> None:
        """Refuse to come after passes beyond those that `not_after` names.

        Raises:
            UsageError: these parameters do not suit one of `earlier`.
        """

    def teacher(self) -> str | None:
        """Return the folder or hub id of the teacher; None for the model as it is before the passes."""
        return None

    def check_teacher(self, facts: ModelFacts, teacher: ModelFacts, *, same_vocabulary: bool) -> None:
        """Refuse a teacher that cannot teach, from the outlines alone; asked where `requires` names `Need.TEACHER`.

        Args:
            facts: the outline as the passes before this one leave it.
            teacher: the teacher's outline.
            same_vocabulary: whether both tokenizers give the same strings the same ids.

        Raises:
            UsageError: it says in what the two do not fit together.
        """

    def text(self, facts: ModelFacts) -> TextRequest | None:  # noqa: ARG002
        """Return what text the pass reads beside the calibration samples, None when it reads none."""
        return None

    def inputs(self) -> tuple[Input, ...]:
        """Return the files, folders and hub ids that the parameters name and the pass reads."""
        return ()

    def trains(self) -> bool:
        """Return whether several processes can share the pass's work."""
        return False

    def whole_bytes(self, facts: ModelFacts) -> int:  # noqa: ARG002
        """Return how many bytes the pass holds at its peak, if it has the whole model in memory."""
        return 0

    def facts_after(self, facts: ModelFacts) -> ModelFacts:
        """Return the outline as the pass will leave it, for what the plan says of sizes and formats."""
        return facts

    def grid(self) -> Grid | None:
        """Return the grid on which the pass puts weights, None if it leaves them in floating point."""
        return None

    def input_grid(self) -> ActivationGrid | None:
        """Return how the pass makes the inputs of layers be rounded, None if it leaves them as they are."""
        return None

    def cache_number(self) -> ActivationNumber | None:
        """Return what the pass makes keys and values be rounded to, None if it leaves them as they are."""
        return None

    def keeps_adapter(self, earlier: Sequence[Pass[Any]]) -> AdapterShape | None:  # noqa: ARG002
        """Return what adapter the pass leaves beside the weights, where `earlier` come before it; None if it does not.

        The adapter fits the weights as they are. So after a pass that leaves one come only those that leave one of the
        same shape, and go on from it.
        """
        return None

    def ignored(self) -> tuple[str, ...]:
        """Return the patterns of layers that the pass leaves alone."""
        return ()

    def left_alone(self, name: str) -> str | None:
        """Return why the pass leaves layer `name` as it is, None when it works on it."""
        pattern = next((pattern for pattern in self.ignored() if matches(name, pattern)), None)
        return None if pattern is None else f"ignored by `{pattern}`"

    def grid_for(self, name: str, allocation: Mapping[str, int] = MappingProxyType({})) -> Grid | None:  # noqa: ARG002
        """Return the grid on which the pass puts layer `name`, None if it leaves it alone or in floating point.

        Args:
            name: the layer.
            allocation: `PassContext.allocation`; none while planning.
        """
        return None if self.left_alone(name) is not None else self.grid()


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


class GraphPass(Pass[P]):
    """A pass on the model's ONNX graph: it runs for each export that is a graph, after all others.

    Attributes:
        rounds: whether it rounds weights. Codes that earlier passes gave them are put into the graph before that.
        reads_attention: whether it looks for attention, which in a graph that we did not trace must be found first.
        tries_samples: whether it looks at calibration samples where there are some, and works without.
    """

    accepts: ClassVar[Literal["torch", "onnx"]] = "onnx"
    rounds: ClassVar[bool] = False
    reads_attention: ClassVar[bool] = False
    tries_samples: ClassVar[bool] = False

    def run(self, model: GraphModel, context: PassContext) -> PassResult:
        """Change the graph in place and return what was done."""
        raise NotImplementedError

    def fixed_axes(self) -> Mapping[str, int]:
        """Return the axes of the graph's inputs that the pass gives a size, by name: `batch`, `sequence` and others."""
        return {}

    def drop(self) -> float | None:
        """Return how much of the outputs may be lost, as mean 1 - cosine; None when they stay as they were."""
        return None

    def stored_bits(self) -> tuple[float | None, float | None]:
        """Return the bits that a weight of a product takes, and one of anything else; None for as many as before."""
        return None, None


class SurveyPass(BlockPass[P]):
    """A block pass that looks at every block before a later pass changes any: it has a sweep to itself.

    `begin` looks at the whole model, `run_block` takes the measure of a block, `conclude` draws at the end what follows
    for the whole model: another model, or advice to later passes.
    """

    def prepare(self, later: Sequence[Pass[Any]]) -> None:
        """Take note of the passes that come after, before anything else is asked.

        Raises:
            UsageError: none of them can use what is found here.
        """

    def begin(self, model: ModelHandle, context: PassContext) -> None:
        """Look at the model before the sweep; what cannot work is refused here, before the sweep's time is spent."""

    def findings(self) -> Any:
        """Return what was found so far as plain data, from which `take_up` goes on."""
        raise NotImplementedError

    def take_up(self, findings: Any) -> None:
        """Go on, after `begin`, with what another process has found of the first blocks."""
        raise NotImplementedError

    def conclude(self, model: ModelHandle, context: PassContext) -> tuple[ModelHandle, PassResult]:
        """Return the model and what follows from all blocks together; it is added to what the sweep gave."""
        raise NotImplementedError


class AllocationPass(SurveyPass[P]):
    """A survey that chooses the grids which a later pass puts layers on."""

    def candidates(self, name: str) -> Sequence[Grid]:
        """Return the grids that layer `name` may be put on by the later pass; none when it is left alone."""
        raise NotImplementedError

    def weight_bytes(self, facts: ModelFacts) -> int:
        """Return how many bytes the quantized layers will take at most, codes and scales."""
        raise NotImplementedError
