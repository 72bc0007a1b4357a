"""A few of the exported model's answers, kept in the artifact: what `llmopt verify` compares with, anywhere, later.

For every position of the rows it was verified with: the likeliest tokens and their log probabilities. For outputs that
are no logits: values at evenly spread places. Some tens of kilobytes of JSON, and neither the source model nor the
calibration text is needed to check the artifact on the machine where it will run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from ..core.errors import LlmoptError
from ..core.manifest import Parity
from ..core.runtime import Session
from ..core.untrusted import read_json
from ..evaluation.parity import cosine_distance, log_softmax
from .parity import Reference, real_only

FINGERPRINT = "llmopt.reference.json"
_TOP = 4
_VALUES = 64
_MAX_INPUTS = 1 << 20
_MAX_KEPT = 64 << 20
_MAX_AXES = 4


class _Values(msgspec.Struct, forbid_unknown_fields=True):
    """Values of an output at some places."""

    places: list[Annotated[int, msgspec.Meta(ge=0)]]
    values: list[float]


class _Logits(msgspec.Struct, forbid_unknown_fields=True):
    """The likeliest tokens, (batch, sequence, top), and their log probabilities."""

    tokens: list[list[list[Annotated[int, msgspec.Meta(ge=0)]]]]
    log_probabilities: list[list[list[float]]]
    scale: float


class _Batch(msgspec.Struct):
    inputs: dict[str, list[Any]]
    outputs: dict[str, dict[str, Any]]


class _Kept(msgspec.Struct):
    samples: str
    batches: list[_Batch]


def write_fingerprint(reference: Reference, path: Path) -> bool:
    """Keep the answers that the artifact was verified with, if the inputs are token ids.

    All of them: an artifact that has just passed on 512 positions may fail by chance on 32.

    Returns:
        False when the inputs are pictures or sound, which are not kept.
    """
    if any(tensor.is_floating_point() for inputs in reference.inputs for tensor in inputs.values()):
        return False
    batches: list[dict[str, Any]] = []
    for inputs, outputs in zip(reference.inputs, reference.outputs, strict=True):
        arrays = {name: tensor.float().numpy() for name, tensor in outputs.items()}
        rows = {name: tensor.numpy().tolist() for name, tensor in inputs.items()}
        batches.append({"inputs": rows, "outputs": _answers(arrays)})
    text = json.dumps({"samples": reference.samples, "batches": batches}, separators=(",", ":"))
    path.write_text(text + "\n", encoding="utf-8")
    return True


@dataclass(frozen=True, slots=True)
class KeptBatch:
    """Inputs, whole numbers by name, (batch, sequence) as a rule, and what the model answered."""

    inputs: dict[str, Any]
    outputs: dict[str, _Logits | _Values]


@dataclass(frozen=True, slots=True)
class Kept:
    """The content of a fingerprint."""

    samples: str
    batches: list[KeptBatch]


def read_fingerprint(path: Path) -> Kept:
    """Read the kept answers.

    Raises:
        LlmoptError: they are none, or more than we ever keep.
    """
    try:
        raw = msgspec.convert(read_json(path, limit=_MAX_KEPT), _Kept)
        return Kept(raw.samples, [_kept_batch(batch) for batch in raw.batches])
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        hint = "build the artifact again"
        raise LlmoptError(f"`{path}` is damaged", where=str(error)[:300], hint=hint) from None


def _kept_batch(batch: _Batch) -> KeptBatch:
    inputs: dict[str, Any] = {}
    for name, rows in batch.inputs.items():
        array = np.array(rows)
        if array.dtype.kind not in "iub" or not 0 < array.size <= _MAX_INPUTS or array.ndim > _MAX_AXES:
            raise ValueError(f"input `{name}` is not of whole numbers, or of none, or of too many")
        inputs[name] = array.astype(np.int64)
    kinds = {name: _Logits if "tokens" in answer else _Values for name, answer in batch.outputs.items()}
    outputs = {name: msgspec.convert(batch.outputs[name], kind) for name, kind in kinds.items()}
    for name, answer in outputs.items():
        _check_answer(name, answer)
    return KeptBatch(inputs, outputs)


def _check_answer(name: str, answer: _Logits | _Values) -> None:
    if isinstance(answer, _Values):
        if len(answer.places) != len(answer.values) or not answer.values:
            raise ValueError(f"output `{name}` has not a value for each place")
        return
    tokens, logs = np.array(answer.tokens), np.array(answer.log_probabilities)
    if tokens.shape != logs.shape or tokens.ndim != 3 or not tokens.size:
        raise ValueError(f"output `{name}` has not a probability for each token")


def check_fingerprint(path: Path, session: Session, *, runtime: str, tolerance: dict[str, float]) -> Parity:
    """Run the kept rows in an opened artifact and compare.

    Args:
        path: the fingerprint.
        session: the artifact, opened.
        runtime: the engine's name and version.
        tolerance: the limits that the artifact was verified with; that of `max_difference` applies to log
            probabilities here, as a share of what twice the largest logit was.
    """
    kept = read_fingerprint(path)
    found = _Found()
    for batch in kept.batches:
        outputs = real_only(batch.inputs, session.outputs(batch.inputs))
        for name, answer in batch.outputs.items():
            if isinstance(answer, _Logits):
                _compare_logits(answer, outputs[name], found)
            elif name in outputs:
                _compare_values(answer, outputs[name], found)
    kl = found.kl / found.logits if found.logits else None
    passed = bool(np.isfinite(found.largest)) and found.positions > 0
    if "max_difference" in tolerance:
        passed &= found.largest <= tolerance["max_difference"] * max(1.0, found.scale)
    if "mean_kl" in tolerance and kl is not None:
        passed &= kl <= tolerance["mean_kl"]
    cosine = found.cosine / found.vectors if found.vectors else None
    if "mean_cosine_distance" in tolerance and cosine is not None:
        passed &= cosine <= tolerance["mean_cosine_distance"]
    return Parity(
        runtime=runtime,
        samples=f"{kept.samples} kept in {FINGERPRINT}",
        positions=found.positions,
        weights_equal=None,
        max_difference=found.largest,
        mean_kl=kl,
        top1_agreement=found.agree / found.logits if found.logits else None,
        mean_cosine_distance=cosine,
        tolerance=tolerance,
        passed=passed,
    )


@dataclass(slots=True)
class _Found:
    """What the comparison of all batches has found so far; sums over the positions of logits."""

    largest: float = 0.0
    scale: float = 0.0
    positions: int = 0
    logits: int = 0
    kl: float = 0.0
    agree: int = 0
    cosine: float = 0.0
    vectors: int = 0

    def compare(self, expected: Any, got: Any) -> None:
        """Add the largest difference and the cosine of two arrays taken as vectors."""
        difference = float(np.abs(expected - got).max())
        self.largest = max(self.largest, difference if np.isfinite(difference) else float("inf"))
        self.cosine += float(cosine_distance(expected.reshape(-1), got.reshape(-1)).sum())
        self.vectors += 1


def _answers(outputs: dict[str, Any]) -> dict[str, Any]:
    if "logits" in outputs and outputs["logits"].ndim == 3:
        logs = log_softmax(outputs["logits"])
        last = min(_TOP, logs.shape[-1]) - 1
        top = np.sort(np.argpartition(-logs, last, axis=-1)[..., :_TOP], axis=-1)
        top = np.take_along_axis(top, np.argsort(-np.take_along_axis(logs, top, -1), axis=-1, kind="stable"), -1)
        values = np.take_along_axis(logs, top, -1)
        # A log probability differs by at most twice as much as the logits do.
        scale = 2 * float(np.abs(outputs["logits"]).max())
        return {"logits": {"tokens": top.tolist(), "log_probabilities": np.round(values, 6).tolist(), "scale": scale}}
    return {
        name: {"places": (places := _places(array.size)), "values": [float(v) for v in array.reshape(-1)[places]]}
        for name, array in outputs.items()
    }


def _places(size: int) -> list[int]:
    return sorted({int(place) for place in np.linspace(0, size - 1, _VALUES)})


def _compare_logits(expected: _Logits, logits: Any, found: _Found) -> None:
    """Add the differences of log probabilities, and a lower bound of the KL divergence.

    The bound is the divergence of the distributions over the kept tokens and one bucket for all others.
    """
    top = np.array(expected.tokens)
    before = np.array(expected.log_probabilities)
    if logits.ndim != 3 or top.shape[:2] != logits.shape[:2] or top.max() >= logits.shape[-1]:
        raise ValueError(f"answers of shape {top.shape} are kept for logits of shape {logits.shape}")
    after = np.take_along_axis(log_softmax(logits), top, -1)
    p, q = np.exp(before), np.exp(after)
    rest_p, rest_q = np.clip(1 - p.sum(-1), 1e-12, 1), np.clip(1 - q.sum(-1), 1e-12, 1)
    kl = (p * (before - after)).sum(-1) + rest_p * np.log(rest_p / rest_q)
    found.compare(before, after)
    found.scale = max(found.scale, expected.scale)
    found.kl += max(float(kl.sum()), 0.0)
    found.agree += int((logits.argmax(-1) == top[..., 0]).sum())
    found.logits += int(kl.size)
    found.positions += int(kl.size)


def _compare_values(expected: _Values, output: Any, found: _Found) -> None:
    values = np.array(expected.values)
    if max(expected.places) >= output.size:
        raise ValueError(f"a value is kept for place {max(expected.places)} of {output.size}")
    found.compare(values, output.reshape(-1)[expected.places])
    found.scale = max(found.scale, float(np.abs(values).max()))
    found.positions += len(values)
