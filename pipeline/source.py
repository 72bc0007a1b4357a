"""What a run starts from: the model, and the text that it is calibrated on."""

from __future__ import annotations

from dataclasses import dataclass

from ..calibration.samples import Samples, load_samples
from ..core.plan import Plan
from ..core.progress import Reporter
from ..models.checkpoint import Checkpoint
from ..models.locate import Location, locate
from ..models.onnx_file import GraphSource
from ..models.text import load_tokenizer
from .parity import ROWS
from .reads import Reads, files_now
from .steps import passes_of


@dataclass(frozen=True, slots=True)
class Source:
    """The model that a run starts from, and the text it is calibrated on.

    Attributes:
        location: the model.
        checkpoint: its weights.
        samples: calibration samples, None without calibration data.
        reads: all files that the run reads.
    """

    location: Location
    checkpoint: Checkpoint | GraphSource
    samples: Samples | None
    reads: Reads

    def sha256(self) -> str:
        """Return the hash of the checkpoint, once it is computed."""
        return self.checkpoint.sha256(self.reads.sha256)

    def spoiled(self) -> bool:
        """Return whether a file that decides what passes make looks different now."""
        return any(one.role != "evaluation" for one in self.reads.changed())


def source_of(plan: Plan, reporter: Reporter) -> Source:
    """Open the model and read the calibration samples, watching every file that the plan reads from now on.

    Raises:
        LlmoptError: they cannot be used.
    """
    reads = Reads(plan.reads, lambda: files_now(plan.recipe, passes_of(plan.recipe)))
    location = locate(plan.recipe.model)
    checkpoint = Checkpoint(location.folder) if location.graph is None else GraphSource(location, plan.facts)
    return Source(location, checkpoint, _samples(plan, location, reads, reporter), reads)


def _samples(plan: Plan, location: Location, reads: Reads, reporter: Reporter) -> Samples | None:
    spec = plan.recipe.calibration
    if spec is None:
        return None
    tokenizer = load_tokenizer(location.folder, trust_remote_code=location.trust_remote_code)
    seed = plan.recipe.seed
    return load_samples(spec, tokenizer, seed=seed, held_out=ROWS, reporter=reporter, digest=reads.sha256)
