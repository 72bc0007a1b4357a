"""ONNX: any transformers model that can be traced, for ONNX Runtime and whatever else reads ONNX.

    model.onnx        the graph
    model.onnx.data   the weights, each stored once
    config.json, tokenizer and processor files

A language model is one graph for the prompt and every later token: `past_key_values.N.key|value` (possibly empty)
go in, `logits` and `present.N.key|value` come out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from msgspec import Meta

from ..core.errors import LlmoptError, UsageError
from ..core.exports import ExportableModel, GraphExporter
from ..core.params import Params
from .onnx_codes import Activations, carry_codes, check_layout
from .onnx_readback import codes_equal
from .onnx_trace import trace

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    import onnx_ir as ir

    from ..core.facts import ModelFacts
    from ..core.graph import Engine
    from ..core.quantized import Grid

GRAPH = "model.onnx"
DATA = "model.onnx.data"


class OnnxParams(Params, frozen=True):
    """How the graph is made."""

    cache: Annotated[
        bool, Meta(description="Give a language model key and value caches, so that it generates token by token.")
    ] = True
    fuse: Annotated[
        bool,
        Meta(
            description="Use ONNX Runtime's fused operators; otherwise a float model has standard operators only. "
            "Where a recipe has passes on the graph, those alone decide."
        ),
    ] = True
    activations: Annotated[
        Activations,
        Meta(description="What quantized products compute with: float32, or int8 (faster, slightly less exact)."),
    ] = "int8"
    last_logits: Annotated[
        bool, Meta(description="Compute a prompt's logits for its last token only: enough to generate, not to score.")
    ] = False
    opset: Annotated[int, Meta(ge=18, description="Version of the ONNX operators.")] | None = None


class Onnx(GraphExporter[OnnxParams]):
    """Trace the model's forward pass, put the quantized layers' codes into it, and save it for ONNX Runtime."""

    name: ClassVar[str] = "onnx"
    runtime: ClassVar[str] = "onnxruntime"
    engine: ClassVar[Engine] = "onnxruntime"
    late: ClassVar[frozenset[str]] = frozenset({"fuse"})  # which passes run decides what it is about
    Params: ClassVar[type[Params]] = OnnxParams

    def check(self, facts: ModelFacts, grid: Grid | None) -> None:
        """Refuse grids that ONNX Runtime cannot compute with.

        Raises:
            UsageError: with the group sizes that it can.
        """
        if self.params.last_logits and not (self.params.cache and facts.is_causal_lm):
            raise UsageError(
                f"`last_logits` of `{self.name}` is for a language model with a cache",
                where=f"{facts.architecture}, cache: {str(self.params.cache).lower()}",
                hint="leave it out",
            )
        check_layout(facts, grid, format_name=self.name)

    def default_passes(self) -> tuple[str, ...]:
        """Return `fuse`, unless the parameters say no."""
        return ("fuse",) if self.params.fuse else ()

    def trace(self, model: ExportableModel) -> ir.Model:
        """Trace the model's forward pass, with a cache where it is a language model.

        Raises:
            LlmoptError: it cannot be traced, or its logits are made in a way of their own.
        """
        from ..graphs.folding import share_transposed

        cache = self.params.cache and model.facts.is_causal_lm
        graph = trace(model.materialize(), cache=cache, opset=self.params.opset)
        share_transposed(graph)
        if self.params.last_logits:
            from ..graphs.decoder import keep_last_logits

            if not keep_last_logits(graph):
                raise LlmoptError(
                    "the product that makes the logits is not found in the graph",
                    where=model.facts.architecture,
                    hint="leave `last_logits` out",
                )
        return graph

    def carry_codes(self, graph: ir.Model, model: ExportableModel) -> list[str]:
        """Replace products with quantized weights by MatMulNBits."""
        return carry_codes(graph, model, activations=self.params.activations)

    def save(self, graph: ir.Model, model: ExportableModel, directory: Path) -> list[str]:
        """Write the graph, its weights and the model's side files."""
        save_graph(graph, directory)
        model.save_side_files(directory)
        notes = _notes(model.facts, cache=self.params.cache and model.facts.is_causal_lm)
        if any(node.op_type == "GroupQueryAttention" for node in graph.graph.all_nodes()):
            notes.append("a batch of several texts continues one token at a time: ONNX Runtime's GroupQueryAttention")
        return notes

    def weights_equal(self, model: ExportableModel, directory: Path, *, rounded: Collection[str] = ()) -> bool | None:
        """Compare every code, scale and zero point of the saved graph with the model's, and with those of its passes.

        Returns:
            None when nothing is quantized.
        """
        import onnx_ir as ir

        if not model.quantized and not rounded:
            return None
        return codes_equal(ir.load(directory / GRAPH), model, rounded)


def save_graph(graph: ir.Model, directory: Path) -> None:
    """Write `model.onnx` and `model.onnx.data`, in standard operators where they are still ours.

    Raises:
        LlmoptError: ONNX Runtime has no kernel for an operator of the graph.
    """
    import onnx_ir as ir

    from ..graphs.attention import spell_out
    from ..graphs.kernels import check_kernels

    spell_out(graph)
    check_kernels(graph)
    name_nodes(graph)
    ir.save(graph, directory / GRAPH, external_data=DATA)


def name_nodes(model: ir.Model) -> None:
    """Name every node and value by its place in the graph: the same model gives the same bytes."""
    kept: set[Any] = {*model.graph.inputs, *model.graph.outputs}
    taken = {value.name for graph in model.graphs() for value in (*graph.inputs, *graph.outputs)}
    taken |= {name for graph in model.graphs() for name in graph.initializers}
    number = 0
    for node in model.graph.all_nodes():
        node.name = f"{node.op_type}_{number}"
        for value in node.outputs:
            if value not in kept and not value.is_graph_output():
                number += 1
                while f"value_{number}" in taken:
                    number += 1
                value.name = f"value_{number}"
        number += 1


def _notes(facts: ModelFacts, *, cache: bool) -> list[str]:
    if facts.is_causal_lm and not cache:
        return ["the graph has no cache: a token costs as much as the whole text before it"]
    if facts.is_encoder_decoder:
        return ["encoder and decoder are one graph without a cache; generating runs both again for every token"]
    return []
