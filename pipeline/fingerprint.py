"""A few of the exported model's answers, kept in the artifact: what `llmopt verify` compares with, anywhere, later.

For every position of a few token rows: the likeliest tokens and their log probabilities. For outputs that are no
logits: values at evenly spread places. Some kilobytes of JSON, and neither the source model nor the calibration text
is needed to check the artifact on the machine where it will run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..core.manifest import Parity
from ..core.runtime import Session
from ..evaluation.parity import log_softmax
from .parity import Reference

FINGERPRINT = "llmopt.reference.json"
_ROWS = 2
_POSITIONS = 16
_TOP = 8
_VALUES = 64


def write_fingerprint(reference: Reference, path: Path) -> bool:
    """Keep the answers of the first rows, if the inputs are token ids.

    Returns:
        False when the inputs are pictures or sound, which are not kept.
    """
    inputs, outputs = reference.inputs[0], reference.outputs[0]
    if any(tensor.is_floating_point() for tensor in inputs.values()):
        return False
    kept: dict[str, Any] = {name: tensor[:_ROWS, :_POSITIONS].numpy().tolist() for name, tensor in inputs.items()}
    arrays = {name: tensor.float().numpy()[:_ROWS] for name, tensor in outputs.items()}
    path.write_text(json.dumps({"samples": reference.samples, "inputs": kept, "outputs": _answers(arrays)}) + "\n")
    return True


def shortened(reference: Reference) -> Reference:
    """Return the reference cut to the rows and positions that a fingerprint keeps, its outputs to be computed anew."""
    inputs = {name: tensor[:_ROWS, :_POSITIONS] for name, tensor in reference.inputs[0].items()}
    return Reference([inputs], [], reference.samples)


def check_fingerprint(path: Path, session: Session, *, runtime: str, tolerance: dict[str, float]) -> Parity:
    """Run the kept rows in an opened artifact and compare.

    Args:
        path: the fingerprint.
        session: the artifact, opened.
        runtime: the engine's name and version.
        tolerance: the limits that the artifact was verified with; those for `max_difference` apply to log
            probabilities here.
    """
    kept = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    inputs = {name: np.array(rows, dtype=np.int64) for name, rows in kept["inputs"].items()}
    outputs = session.outputs(inputs)
    expected = cast("dict[str, Any]", kept["outputs"])
    if "logits" in expected:
        largest, kl, agreement, positions = _compare_logits(expected["logits"], outputs["logits"])
        scale = 1.0
    else:
        largest, scale, positions = _compare_values(expected, outputs)
        kl, agreement = None, None
    passed = bool(np.isfinite(largest)) and positions > 0
    if "max_difference" in tolerance:
        passed &= largest <= tolerance["max_difference"] * max(1.0, scale)
    if "mean_kl" in tolerance and kl is not None:
        passed &= kl <= tolerance["mean_kl"]
    return Parity(
        runtime=runtime,
        samples=f"{kept['samples']} kept in {FINGERPRINT}",
        positions=positions,
        weights_equal=None,
        max_difference=largest,
        mean_kl=kl,
        top1_agreement=agreement,
        tolerance=tolerance,
        passed=passed,
    )


def _answers(outputs: dict[str, Any]) -> dict[str, Any]:
    if "logits" in outputs and outputs["logits"].ndim == 3:
        logs = log_softmax(outputs["logits"])
        top = np.argsort(-logs, axis=-1, kind="stable")[..., :_TOP]
        values = np.take_along_axis(logs, top, -1)
        return {"logits": {"tokens": top.tolist(), "log_probabilities": np.round(values, 7).tolist()}}
    return {
        name: {"places": (places := _places(array.size)), "values": [float(v) for v in array.reshape(-1)[places]]}
        for name, array in outputs.items()
    }


def _places(size: int) -> list[int]:
    return sorted({int(place) for place in np.linspace(0, size - 1, _VALUES)})


def _compare_logits(expected: dict[str, Any], logits: Any) -> tuple[float, float, float, int]:
    """Return the largest difference of log probabilities, a lower bound of the mean KL, agreement, positions.

    The bound is the divergence of the distributions over the kept tokens and one bucket for all others.
    """
    top = np.array(expected["tokens"])
    before = np.array(expected["log_probabilities"])
    after = np.take_along_axis(log_softmax(logits), top, -1)
    p, q = np.exp(before), np.exp(after)
    rest_p, rest_q = np.clip(1 - p.sum(-1), 1e-12, 1), np.clip(1 - q.sum(-1), 1e-12, 1)
    kl = (p * (before - after)).sum(-1) + rest_p * np.log(rest_p / rest_q)
    agreement = (logits.argmax(-1) == top[..., 0]).mean()
    return float(np.abs(before - after).max()), float(max(kl.mean(), 0.0)), float(agreement), int(kl.size)


def _compare_values(expected: dict[str, Any], outputs: Any) -> tuple[float, float, int]:
    largest, scale, positions = 0.0, 0.0, 0
    for name, kept in expected.items():
        if name in outputs:
            values = np.array(kept["values"])
            got = outputs[name].reshape(-1)[kept["places"]]
            largest = max(largest, float(np.abs(values - got).max()))
            scale = max(scale, float(np.abs(values).max()))
            positions += len(values)
    return largest, scale, positions
