"""OpenVINO: the traced graph for Intel's engine, which is fast on AMD's and ARM's processors too.

openvino_model.xml, openvino_model.bin      the graph and its weights
config.json, tokenizer and processor files
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from msgspec import Meta

from ..core.ends import scratch
from ..core.errors import LlmoptError, UsageError
from ..core.exports import ExportableModel, GraphExporter
from ..core.params import Params
from .onnx import GRAPH, save_graph
from .onnx_trace import captured, trace

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import onnx_ir as ir

    from ..core.facts import ModelFacts
    from ..core.graph import Engine
    from ..core.quantized import Grid

MODEL = "openvino_model.xml"
PRECISION = ("runtime_options", "INFERENCE_PRECISION_HINT")
"""Where the file says what to compute with; the runtime asks the engine for it."""


class OpenVinoParams(Params, frozen=True):
    """How the graph is made, and computed."""

    cache: Annotated[
        bool, Meta(description="Give a language model key and value caches, so that it generates token by token.")
    ] = True
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        Meta(description="What to compute with. bfloat16 is twice as fast on processors that have it."),
    ] = "float32"


class OpenVino(GraphExporter[OpenVinoParams]):
    """Trace the model's forward pass and save it for OpenVINO."""

    name: ClassVar[str] = "openvino"
    runtime: ClassVar[str] = "openvino"
    engine: ClassVar[Engine] = "openvino"
    late: ClassVar[frozenset[str]] = frozenset({"dtype"})
    Params: ClassVar[type[Params]] = OpenVinoParams

    def check(self, facts: ModelFacts, grid: Grid | None) -> None:
        """Refuse weights in packed codes, and a machine without OpenVINO.

        Raises:
            UsageError: with what to do.
        """
        from importlib.util import find_spec

        del facts
        if grid is not None:
            raise UsageError(
                f"`{self.name}` cannot hold {grid} weights",
                where="they would be multiplied in floating point",
                hint="use --export onnx, or the pass `quantize-static` for 8-bit products",
            )
        if find_spec("openvino") is None:
            raise UsageError("OpenVINO is not installed", hint="pip install 'llmopt[openvino]'")

    def trace(self, model: ExportableModel) -> ir.Model:
        """Trace the model's forward pass, with a cache where it is a language model."""
        from ..graphs.folding import share_transposed

        graph = trace(model.materialize(), cache=self.params.cache and model.facts.is_causal_lm, opset=None)
        share_transposed(graph)
        return graph

    def carry_codes(self, graph: ir.Model, model: ExportableModel) -> list[str]:
        """Do nothing: there are none."""
        del graph, model
        return []

    def save(self, graph: ir.Model, model: ExportableModel, directory: Path) -> list[str]:
        """Convert the graph and write it, with the model's side files.

        Raises:
            LlmoptError: OpenVINO does not take the graph.
        """
        import openvino

        with scratch() as folder:
            save_graph(graph, folder)
            with captured("openvino"):
                try:
                    converted = openvino.Core().read_model(folder / GRAPH)
                except RuntimeError as error:
                    raise LlmoptError("OpenVINO does not take the graph", where=str(error).strip()[-600:]) from error
                _name_operations(converted)
                converted.set_rt_info({"float32": "f32", "bfloat16": "bf16"}[self.params.dtype], list(PRECISION))
                openvino.save_model(converted, directory / MODEL, compress_to_fp16=False)
        model.save_side_files(directory)
        return []

    def weights_equal(self, model: ExportableModel, directory: Path, *, rounded: Collection[str] = ()) -> bool | None:
        """Compare the codes and scales of the saved model with those that passes on the graph made.

        Returns:
            None when they made none.
        """
        del model
        return set(rounded) <= set(_digests(directory / MODEL)) if rounded else None


def _name_operations(model: Any) -> None:
    """Name every operation but the inputs by its place: OpenVINO counts through all that a process has made."""
    for number, operation in enumerate(model.get_ordered_ops()):
        kind = operation.get_type_name()
        if kind != "Parameter":
            operation.set_friendly_name(f"{kind}_{number}")


def _digests(path: Path) -> Iterator[str]:
    """Yield a hash of the numbers of every constant, bytes with a sign as codes around 128."""
    import numpy as np
    import openvino

    from ..graphs.nbits import digest

    for node in openvino.Core().read_model(path).get_ops():
        if node.get_type_name() != "Constant":
            continue
        array, kind = node.data, node.get_element_type().get_type_name()
        if kind in ("u4", "i4"):
            packed = np.asarray(array).view(np.uint8).reshape(-1)
            shape = list(node.get_output_shape(0))
            array = np.stack([packed & 15, packed >> 4], -1).reshape(-1)[: prod(shape)].reshape(shape)
            if len(shape) == 3 and shape[-1] == 1:  # zero points, a row of which fills whole bytes
                yield digest(array[:, :-1])
        elif kind == "i8":
            array = (array.astype(np.int16) + 128).astype(np.uint8)
        yield digest(array)
