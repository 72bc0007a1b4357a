"""Opening an artifact again in its runtime and comparing it with the model that was exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.exports import Exporter
from ..core.manifest import Parity
from ..evaluation.parity import Comparison, Tolerance
from ..exporters.dummy_inputs import sample_inputs
from ..models.handle import TorchModel
from ..models.reference import reference_outputs
from ..models.text import batches, random_rows
from ..runtimes import RUNTIMES

ROWS = 8
LENGTH = 64
"""What is compared: so many rows of so many tokens."""

_EXACT = 1e-3
_HALF = 2e-2
_INT8_ACTIVATIONS_KL = 0.01


@dataclass(frozen=True, slots=True)
class Reference:
    """The exported model's answers.

    Attributes:
        inputs: batches.
        outputs: for each batch, the model's outputs by name.
        samples: what the inputs are, in words.
    """

    inputs: list[dict[str, Tensor]]
    outputs: list[dict[str, Tensor]]
    samples: str


def make_reference(model: TorchModel, rows: Sequence[Sequence[int]], seed: int) -> Reference:
    """Compute what artifacts are compared with.

    Args:
        model: the model as the passes left it.
        rows: held-out token rows; random ones are made when there are none.
        seed: for the random ones.
    """
    skeleton = model.skeleton()
    if skeleton.model.main_input_name != "input_ids":
        inputs, samples = [dict(sample_inputs(skeleton.model).tensors)], "made-up inputs"
    else:
        cut = [list(row[:LENGTH]) for row in rows[:ROWS]]
        samples = "held-out calibration text" if cut else "random token ids"
        vocabulary = skeleton.config.get_text_config().vocab_size
        cut = cut or random_rows(vocabulary, rows=ROWS, length=LENGTH, seed=seed)
        inputs = batches(cut, decoder=bool(skeleton.config.is_encoder_decoder))
    del skeleton
    return Reference(inputs, reference_outputs(model, inputs), samples)


def compare(exporter: Exporter[Any], model: TorchModel, directory: Path, reference: Reference) -> Parity:
    """Open the artifact in its runtime, read its weights back, and compare its outputs with the reference."""
    runtime = RUNTIMES.load(exporter.runtime)()
    weights_equal = exporter.weights_equal(model, directory)
    comparison = Comparison()
    session = runtime.open(directory)
    try:
        for inputs, outputs in zip(reference.inputs, reference.outputs, strict=True):
            made = session.outputs({name: tensor.numpy() for name, tensor in inputs.items()})
            comparison.add({name: tensor.float().numpy() for name, tensor in outputs.items()}, made)
    finally:
        session.close()
    return comparison.result(
        runtime=runtime.version(),
        samples=reference.samples,
        weights_equal=weights_equal,
        tolerance=tolerance_of(exporter, model),
    )


def tolerance_of(exporter: Exporter[Any], model: TorchModel) -> Tolerance:
    """Return the limits for an export.

    An artifact that computes in float32 with the very weights must agree to 1e-3. Where the engine rounds on the way
    (int8 activations, float16) single logits may differ, so the distributions are compared. A reader that multiplies
    half-precision scales out in float32 gets weights that were not rounded as ours are.
    """
    params = exporter.params
    if model.quantized and getattr(params, "activations", None) == "int8":
        return Tolerance(mean_kl=_INT8_ACTIVATIONS_KL)
    if getattr(params, "precision", "float32") == "float16":
        return Tolerance(max_difference=_HALF, mean_kl=_INT8_ACTIVATIONS_KL)
    if model.quantized and model.facts.dtype != "float32":
        return Tolerance(max_difference=_HALF, mean_kl=_EXACT)
    return Tolerance(max_difference=_EXACT, mean_kl=_EXACT)
