"""Opening an artifact again in its runtime and comparing it with the model that was exported."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor

from ..core.errors import LlmoptError
from ..core.exports import ExportableModel, Exporter, GraphExporter
from ..core.manifest import Parity
from ..core.runtime import Arrays, Runtime
from ..core.threads import threads
from ..evaluation.parity import Comparison, Tolerance
from ..exporters.dummy_inputs import accepted, sample_inputs
from ..models.handle import TorchModel
from ..models.locate import context_length
from ..models.onnx_file import GraphSource
from ..models.reference import reference_outputs, streamed_outputs
from ..models.text import batches, random_rows
from ..models.unpacked import UnpackedFolder, same_weights
from ..runtimes import RUNTIMES
from .memory import WHOLE_BYTES

ROWS = 8
LENGTH = 64
"""What is compared: so many rows of so many tokens, fewer rows where the vocabulary is large."""

_MULTIPLICATIONS = 1 << 36
_FEWEST = 2 * 32
"""Fewer tokens too where the model is large: parameters times tokens stay below the first, tokens above the second."""

_LOGITS = 1 << 23
"""Logits to compare, 32 MiB in float32."""

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


@dataclass(frozen=True, slots=True)
class TextFacts:
    """What token ids a model takes.

    Attributes:
        vocabulary: how many there are.
        parameters: weights that each is multiplied with.
        context: how many a row may have, None where there is no limit.
        decoder: whether the model has a decoder beside its encoder, which is given the same ids.
    """

    vocabulary: int
    parameters: int
    context: int | None
    decoder: bool


def make_reference(
    model: TorchModel, rows: Sequence[Sequence[int]], seed: int, axes: Mapping[str, int] = MappingProxyType({})
) -> Reference:
    """Compute what artifacts are compared with.

    Args:
        model: the model as the passes left it.
        rows: held-out token rows; random ones are made when there are none.
        seed: for the random ones.
        axes: sizes that the artifacts' inputs must have, by name.
    """
    skeleton = model.skeleton()
    if skeleton.model.main_input_name != "input_ids":
        inputs, samples = [dict(sample_inputs(skeleton.model).tensors)], "made-up inputs"
    else:
        text = TextFacts(
            skeleton.config.get_text_config().vocab_size,
            model.facts.parameters,
            context_length(skeleton.config.to_dict()),
            decoder=skeleton.has_decoder,
        )
        inputs, samples = token_batches(text, rows, seed, axes)
        if not axes and not model.facts.is_causal_lm and "attention_mask" in accepted(skeleton.model):
            padding = getattr(skeleton.config.get_text_config(), "pad_token_id", None)
            inputs = [ragged(inputs, 0 if padding is None else padding)]
    kind = type(skeleton.model).__name__
    del skeleton
    outputs = [real_only(batch, made) for batch, made in zip(inputs, reference_outputs(model, inputs), strict=True)]
    return finite(Reference(inputs, outputs, samples), kind)


def token_batches(
    text: TextFacts, rows: Sequence[Sequence[int]], seed: int, axes: Mapping[str, int]
) -> tuple[list[dict[str, Tensor]], str]:
    """Return token ids to compare answers on, as many as the model's size leaves time for, and what they are.

    Args:
        text: of the model.
        rows: held-out token rows; random ones are made when there are none, or none is long enough.
        seed: for the random ones.
        axes: the sizes that `batch` and `sequence` must have, where they are fixed.
    """
    tokens = max(_FEWEST, min(ROWS * LENGTH, _LOGITS // text.vocabulary, _MULTIPLICATIONS // text.parameters))
    length = axes.get("sequence", min(LENGTH, tokens // 2, text.context or LENGTH))
    batch = axes.get("batch", 1)
    count = max(1, min(ROWS, tokens // length) // batch) * batch
    cut = [list(row[:length]) for row in rows[:count] if len(row) >= length or not axes]
    if len(cut) % batch or not cut:
        cut, samples = random_rows(text.vocabulary, rows=count, length=length, seed=seed), "random token ids"
    else:
        samples = "held-out calibration text"
    return batches(cut, decoder=text.decoder, tokens=batch * length if "batch" in axes else 2048), samples


def finite(reference: Reference, kind: str) -> Reference:
    """Return a reference whose answers are numbers.

    Raises:
        LlmoptError: one is NaN or infinite.
    """
    for name, value in (item for batch in reference.outputs for item in batch.items()):
        if not bool(torch.isfinite(value).all()):
            raise LlmoptError(
                f"the `{name}` of {kind} hold NaN or Inf",
                where=f"computed from {reference.samples}, in float32",
                hint="the model overflows: check its weights",
            )
    return reference


def ragged(inputs: Sequence[Mapping[str, Tensor]], padding: int) -> dict[str, Tensor]:
    """Return the rows of batches as one, cut to different lengths and padded on the right, as an encoder meets them."""
    rows = [row for batch in inputs for row in batch["input_ids"]]
    longest = max(len(row) for row in rows)
    cut = [row[: max(1, longest * (number + 1) // len(rows))] for number, row in enumerate(rows)]
    ids = torch.nn.utils.rnn.pad_sequence(cut, batch_first=True, padding_value=padding)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in cut], batch_first=True)
    made = {"input_ids": ids, "attention_mask": mask}
    decoded = [row for batch in inputs for row in batch.get("decoder_input_ids", ())]
    return made | {"decoder_input_ids": torch.stack(decoded)} if decoded else made


def real_only(inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return outputs, arrays or tensors, with zeros where a token is padding: what a model says there means nothing."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return dict(outputs)
    return {name: _masked(value, mask) if value.shape[:2] == mask.shape else value for name, value in outputs.items()}


def _masked(value: Any, mask: Any) -> Any:
    ones = mask.reshape(*mask.shape, *(1,) * (value.ndim - 2))
    return value * (ones.to(value.dtype) if isinstance(value, Tensor) else ones.astype(value.dtype))


def compare(
    exporter: Exporter[Any],
    model: TorchModel | GraphSource,
    directory: Path,
    reference: Reference,
    *,
    drop: float | None = None,
    rounded: Collection[str] = (),
) -> Parity:
    """Open the artifact in its runtime, read its weights back, and compare its outputs with the reference.

    Args:
        exporter: what wrote it.
        model: the model that was exported.
        directory: the artifact.
        reference: the model's answers.
        drop: how much of the outputs may be lost, as mean 1 - cosine; None when they should be the same.
        rounded: hashes of what passes on a graph rounded.
    """
    runtime = RUNTIMES.load(exporter.opened_in())()
    comparison = Comparison()
    version = runtime.version()
    if isinstance(exporter, GraphExporter):
        # Of a graph's source, reading back asks for what torch passes quantized, which is nothing.
        exported = cast("ExportableModel", model)
        weights_equal = exporter.weights_equal(exported, directory, rounded=rounded)
        answers = opened(runtime, directory, reference)
    elif isinstance(model, GraphSource):
        weights_equal, answers = None, opened(runtime, directory, reference)
    elif runtime.name != "transformers" or model.facts.parameters * 4 <= WHOLE_BYTES:
        weights_equal = exporter.weights_equal(model, directory)
        answers = opened(runtime, directory, reference)
    elif same_weights(model, directory):
        # The modules are transformers' own in either case: the same weights give the same answers.
        version = f"{version}, weight by weight"
        rounded = model.inputs or model.caches  # of which only the exporter's own reader knows
        weights_equal = exporter.weights_equal(model, directory) if rounded else True
        answers = ({name: tensor.float().numpy() for name, tensor in made.items()} for made in reference.outputs)
    else:
        version, weights_equal = f"{version}, block by block", exporter.weights_equal(model, directory)
        answers = _streamed(model, directory, reference)
    for outputs, made in zip(reference.outputs, answers, strict=True):
        comparison.add({name: tensor.float().numpy() for name, tensor in outputs.items()}, made)
    return comparison.result(
        runtime=version,
        samples=reference.samples,
        weights_equal=weights_equal,
        tolerance=tolerance_of(exporter, model) if drop is None else Tolerance(mean_cosine_distance=drop),
    )


def opened(runtime: Runtime, directory: Path, reference: Reference, *, adapter: Path | None = None) -> Iterator[Arrays]:
    """Open the artifact as its users do, with the adapter in a folder if one is given, and yield its answers."""
    session = runtime.open(directory, threads=threads())
    try:
        if adapter is not None:
            session.adapt(adapter)
        for inputs in reference.inputs:
            arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
            yield real_only(arrays, session.outputs(arrays))
    finally:
        session.close()


def _streamed(model: TorchModel, directory: Path, reference: Reference) -> Iterator[Arrays]:
    """Yield the answers of an artifact that would take too much memory whole: its blocks one after the other."""
    for made in streamed_outputs(model.skeleton(), UnpackedFolder(directory).read, reference.inputs):
        yield {name: tensor.float().numpy() for name, tensor in made.items()}


def tolerance_of(exporter: Exporter[Any], model: TorchModel | GraphSource) -> Tolerance:
    """Return the limits for an export.

    An artifact that computes in float32 with the very weights must agree to 1e-3. Where the engine rounds on the way
    (int8 activations, float16) single logits may differ, so the distributions are compared. A reader that multiplies
    half-precision scales out in float32 gets weights that were not rounded as ours are; where activations are rounded
    behind them, some fall the other way.
    """
    params = exporter.params
    if isinstance(model, GraphSource) and model.facts.dtype in {"float16", "bfloat16"}:
        return Tolerance(max_difference=_HALF, mean_kl=_EXACT)
    if model.quantized and getattr(params, "activations", None) == "int8":
        return Tolerance(mean_kl=_INT8_ACTIVATIONS_KL)
    if getattr(params, "dtype", "float32") == "bfloat16":
        return Tolerance(mean_cosine_distance=_HALF, mean_kl=_INT8_ACTIVATIONS_KL)
    if getattr(params, "dtype", "float32") == "float16":
        return Tolerance(max_difference=_HALF, mean_kl=_INT8_ACTIVATIONS_KL)
    if not isinstance(model, GraphSource) and model.quantized and model.facts.dtype != "float32":
        rounds = bool(model.inputs or model.caches)
        return Tolerance(mean_kl=_INT8_ACTIVATIONS_KL) if rounds else Tolerance(max_difference=_HALF, mean_kl=_EXACT)
    return Tolerance(max_difference=_EXACT, mean_kl=_EXACT)
