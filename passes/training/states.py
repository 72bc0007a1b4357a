"""What survives: the best state so far, and checkpoints from which a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...core.errors import LlmoptError, UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ...core.model import ModelHandle

_BEST = "best.safetensors"
_STATE = "state.json"
_PREFIX = "step-"


@dataclass(slots=True)
class Progress:
    """How far a run is, beside its weights.

    Attributes:
        step: steps done.
        best: the smallest loss on held-out rows, None before the first.
        best_step: after how many steps that was.
        waited: evaluations since then.
        stopped: whether it has waited long enough.
        curve: points measured.
        window: losses of the steps since the last point, summed, and how many those are.
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    stopped: bool = False
    curve: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    window: list[float] = field(default_factory=list[float])
    window_steps: int = 0


class Keeper:
    """Where states are kept.

    Args:
        work: a folder that vanishes with the run.
        checkpoint: the folder that the user named, None when nothing is to survive the run.
        identity: what a run must have in common with the one that it goes on with.
        accelerator: knows which process writes.
    """

    def __init__(
        self, work: Path, checkpoint: Path | None, identity: Mapping[str, Any], accelerator: Accelerator
    ) -> None:
        self._folder, self._checkpoint = checkpoint or work, checkpoint
        self._identity, self._accelerator = json.loads(json.dumps(identity)), accelerator
        if checkpoint is not None:
            _prepare(checkpoint)

    @property
    def best(self) -> Path:
        """The file with the best state."""
        return self._folder / _BEST

    def keep_best(self, pupil: Any) -> None:
        """Write the student's trained parameters as the best so far."""
        names = {name for name, one in self._accelerator.unwrap_model(pupil).named_parameters() if one.requires_grad}
        state: dict[str, Any] = self._accelerator.get_state_dict(pupil)  # pyright: ignore[reportAssignmentType]
        if self._accelerator.is_main_process:
            kept = {
                name.removeprefix("student."): tensor.detach().cpu().contiguous()
                for name, tensor in state.items()
                if name in names and name.startswith("student.")
            }
            partial = self.best.with_suffix(".partial")
            save_file(kept, partial)
            partial.replace(self.best)
        self._accelerator.wait_for_everyone()

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, and remove the one before it."""
        assert self._checkpoint is not None
        place = self._checkpoint / f"{_PREFIX}{progress.step:08d}"
        partial = place.with_suffix(".partial")
        if self._accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self._accelerator.wait_for_everyone()
        self._accelerator.save_state(str(partial))
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            document = {"identity": self._identity, "progress": asdict(progress)}
            (partial / _STATE).write_text(json.dumps(document), encoding="utf-8")
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)
            for other in _steps(self._checkpoint):
                if other != place:
                    shutil.rmtree(other, ignore_errors=True)
        self._accelerator.wait_for_everyone()

    def resume(self) -> Progress | None:
        """Load the last checkpoint into what the accelerator has prepared, and return how far it is; None without one.

        Raises:
            UsageError: it belongs to another run.
            LlmoptError: it is damaged.
        """
        found = _steps(self._checkpoint) if self._checkpoint is not None else []
        if not found:
            return None
        place = found[-1]
        try:
            document = json.loads((place / _STATE).read_text(encoding="utf-8"))
            known, progress = dict(document["identity"]), Progress(**document["progress"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(place, error) from None
        different = sorted(key for key in {*known, *self._identity} if known.get(key) != self._identity.get(key))
        if different:
            raise UsageError(
                f"the checkpoint `{place}` belongs to another run",
                where=f"different: {', '.join(different)}",
                hint="name another folder as `checkpoint`, or remove this one to start anew",
            )
        try:
            self._accelerator.load_state(str(place))
        except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
            raise _damaged(place, error) from error
        return progress


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state that `Keeper.keep_best` wrote."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def digest(model: ModelHandle) -> str:
    """Return a digest of a model's weights as the passes left them, and of the adapter beside them."""
    sha = hashlib.sha256()
    for name, (dtype, shape) in model.tensor_specs().items():
        sha.update(f"{name} {dtype} {shape}".encode())
        sha.update(model.read(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for name, tensor in model.adapter_tensors().items():
        sha.update(name.encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write to `{folder}`", where=error.strerror, hint="name another folder as `checkpoint`"
        ) from None
    foreign = [
        one.name for one in folder.iterdir() if one.name != _BEST and not one.name.startswith((_PREFIX, "best."))
    ]
    if foreign:
        raise UsageError(
            f"`{folder}` is no folder of checkpoints",
            where=f"it holds {', '.join(sorted(foreign)[:3])}",
            hint="name a new or empty folder as `checkpoint`",
        )


def _steps(folder: Path) -> list[Path]:
    return sorted(one for one in folder.glob(f"{_PREFIX}*") if one.is_dir() and one.suffix != ".partial")


def _damaged(place: Path, error: Exception) -> LlmoptError:
    return LlmoptError(
        f"the checkpoint `{place}` is damaged",
        where=f"{type(error).__name__}: {error}".splitlines()[0][:200],
        hint="remove it; the run starts anew",
    )
