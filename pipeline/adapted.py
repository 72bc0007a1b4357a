"""Opening an artifact with the adapter that lies beside it, and comparing both together with the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.adapter import FOLDER
from ..core.exports import Exporter
from ..core.manifest import Parity
from ..core.runtime import Arrays
from ..evaluation.parity import Comparison
from ..exporters.safetensors import Safetensors
from ..models.handle import TorchModel
from ..models.onnx_file import GraphSource
from ..models.reference import adapted_outputs
from ..models.unpacked import UnpackedFolder
from ..runtimes import RUNTIMES
from ..runtimes.versions import installed
from .memory import WHOLE_BYTES
from .parity import Reference, opened, real_only, tolerance_of

if TYPE_CHECKING:
    from torch import Tensor


def compare_adapted(
    exporter: Exporter[Any], model: TorchModel | GraphSource, directory: Path, reference: Reference
) -> Parity | None:
    """Read the adapter back, and compare base and adapter together with what the model learnt.

    A base that would take too much memory whole is computed block by block from its files; its adapter is the model's,
    bit for bit.

    Args:
        exporter: what wrote the artifact.
        model: the model that was exported.
        directory: the artifact.
        reference: the answers of the base alone; its inputs are used.

    Returns:
        None when the model has no adapter.
    """
    if isinstance(model, GraphSource) or model.adapter is None:
        return None
    assert isinstance(exporter, Safetensors), "the plan refuses others"
    runtime = RUNTIMES.load(exporter.opened_in())()
    expected = adapted_outputs(model, reference.inputs)
    whole = runtime.name != "transformers" or model.facts.parameters * 4 <= WHOLE_BYTES
    if whole:
        answers = opened(runtime, directory, reference, adapter=directory / FOLDER)
    else:
        made = adapted_outputs(model, reference.inputs, read=UnpackedFolder(directory).read)
        answers = (_arrays(inputs, one) for inputs, one in zip(reference.inputs, made, strict=True))
    comparison = Comparison()
    for inputs, outputs, got in zip(reference.inputs, expected, answers, strict=True):
        comparison.add(_arrays(inputs, outputs), got)
    return comparison.result(
        runtime=f"{installed('peft')}, {runtime.version()}{'' if whole else ', block by block'}",
        samples=reference.samples,
        weights_equal=exporter.adapter_equal(model, directory),
        tolerance=tolerance_of(exporter, model),
    )


def _arrays(inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Arrays:
    return {name: tensor.float().numpy() for name, tensor in real_only(inputs, outputs).items()}
