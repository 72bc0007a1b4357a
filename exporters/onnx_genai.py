"""ONNX Runtime GenAI: a folder that its generator loads, for decoder language models.

    model.onnx, model.onnx.data   one graph with fused attention, for the prompt and every later token
    genai_config.json             what the generator reads first
    config.json, tokenizer files

The graph comes from GenAI's own model builder, in floating point; the quantized layers' codes are put into it.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from msgspec import Meta

from ..core.errors import LlmoptError, UsageError
from ..core.exports import ExportableModel, ExportContext, Exporter, ExportResult
from ..core.params import Params
from .onnx_codes import Activations, carry_codes, check_layout
from .onnx_genai_builder import build, known_architectures, rope_fault
from .onnx_readback import codes_equal
from .onnx_trace import captured

if TYPE_CHECKING:
    from ..core.facts import ModelFacts
    from ..core.quantized import Grid

GRAPH = "model.onnx"
DATA = "model.onnx.data"


class OnnxGenAIParams(Params, frozen=True):
    """What the folder is built for."""

    target: Annotated[Literal["cpu", "cuda"], Meta(description="Where it will run.")] = "cpu"
    precision: Annotated[
        Literal["float32", "float16"] | None,
        Meta(description="What is not quantized computes in this; float32 on cpu, float16 on cuda if not given."),
    ] = None
    activations: Annotated[
        Activations,
        Meta(description="What quantized products compute with on cpu: float32, or int8 (faster, less exact)."),
    ] = "int8"
    all_logits: Annotated[
        bool,
        Meta(description="Compute logits for every token of a prompt, for scoring; otherwise for the last one only."),
    ] = False

    @property
    def dtype(self) -> Literal["float32", "float16"]:
        """The precision, filled in."""
        return self.precision or ("float32" if self.target == "cpu" else "float16")


class OnnxGenAI(Exporter[OnnxGenAIParams]):
    """Build the folder with GenAI's builder from the dequantized model, and carry the codes into its graph."""

    name: ClassVar[str] = "onnx-genai"
    runtime: ClassVar[str] = "onnx-genai"
    Params: ClassVar[type[Params]] = OnnxGenAIParams

    def check(self, facts: ModelFacts, grid: Grid | None) -> None:
        """Refuse models that the installed builder does not name, or that have no tokenizer, and grids without a block.

        Raises:
            UsageError: with what to use instead.
        """
        if not facts.is_causal_lm or facts.architecture not in known_architectures():
            raise UsageError(
                f"the ONNX Runtime GenAI builder does not know {facts.architecture or facts.model_type}",
                where=facts.source,
                hint="use the `onnx` export instead",
            )
        if fault := rope_fault(facts.architecture, facts.config):
            raise UsageError(
                f"the ONNX Runtime GenAI builder does not compute the positions of {facts.architecture} right",
                where=fault,
                hint="use the `onnx` export instead",
            )
        if not facts.has_tokenizer:
            raise UsageError(
                "an ONNX Runtime GenAI folder needs a tokenizer",
                where=f"{facts.source} has no tokenizer.json",
                hint="put the tokenizer's files beside the weights, or use the `onnx` export instead",
            )
        if self.params.target == "cpu" and self.params.dtype == "float16":
            raise UsageError(
                "the ONNX Runtime GenAI builder has no float16 for cpu",
                where="target: cpu, precision: float16",
                hint="use precision: float32, or target: cuda",
            )
        check_layout(facts, grid, format_name=self.name)

    def export(self, model: ExportableModel, directory: Path, context: ExportContext) -> ExportResult:
        """Write the folder.

        Raises:
            LlmoptError: the builder fails, or a quantized layer is not found in its graph.
        """
        import onnx_ir as ir

        result = ExportResult()
        # Inside the artifact's own folder: it is on a disk with room for the model, and goes with it when killed.
        with (
            tempfile.TemporaryDirectory(dir=directory, prefix=".build-") as scratch,
            context.reporter.step("building for ONNX Runtime GenAI", 3) as step,
        ):
            checkpoint, built = Path(scratch, "checkpoint"), Path(scratch, "built")
            checkpoint.mkdir()
            self._write_checkpoint(model, checkpoint)
            step.advance(detail="dequantized")
            build(
                checkpoint,
                built,
                precision="fp32" if self.params.dtype == "float32" else "fp16",
                provider=self.params.target,
                options=self._options(model),
                architecture=model.facts.architecture,
            )
            step.advance(detail="built")
            graph = ir.load(built / GRAPH)
            # The builder adds the commit of whatever git checkout Python's packages lie in.
            graph.producer_version = version("onnxruntime-genai")
            _check_logits(graph, all_logits=self.params.all_logits)
            activations = self.params.activations if self.params.target == "cpu" else "float32"
            result.notes += carry_codes(graph, model, activations=activations)
            ir.save(graph, directory / GRAPH, external_data=DATA)
            model.save_side_files(directory)
            # The builder's tokenizer files win: it writes model_max_length as a number that GenAI can parse.
            for file in sorted(built.iterdir()):
                if file.is_file() and file.name not in (GRAPH, DATA):
                    shutil.copyfile(file, directory / file.name)
            step.advance(detail="saved")
        if not self.params.all_logits:
            result.notes.append("logits are computed for the last token of a prompt only (`all_logits: true` for all)")
        return result

    def weights_equal(self, model: ExportableModel, directory: Path) -> bool | None:
        """Compare every code, scale and zero point of the saved graph with the model's.

        Returns:
            None when the model is not quantized.
        """
        import onnx_ir as ir

        return codes_equal(ir.load(directory / GRAPH), model) if model.quantized else None

    def _write_checkpoint(self, model: ExportableModel, directory: Path) -> None:
        with captured("transformers"):
            model.materialize(self.params.dtype).save_pretrained(directory)
        model.save_side_files(directory, config_changes={"dtype": self.params.dtype})

    def _options(self, model: ExportableModel) -> dict[str, str]:
        inside = {linear.name for linear in model.facts.linears}
        mixed = bool(model.quantized) and not inside <= set(model.quantized)
        return {
            "prune_lm_head": str(not self.params.all_logits).lower(),
            # One fused product cannot be part float, part codes.
            "fuse_qkv": str(not mixed).lower(),
            "hf_token": "false",
        }


def _check_logits(graph: object, *, all_logits: bool) -> None:
    """Read back whether the builder heeded `prune_lm_head`: it ignores options that it does not know."""
    import onnx_ir as ir

    assert isinstance(graph, ir.Model)
    logits = next((value for value in graph.graph.outputs if value.name == "logits"), None)
    if logits is None or logits.shape is None:
        raise LlmoptError("the built graph has no logits")
    if (logits.shape[1] == 1) == all_logits:
        raise LlmoptError(
            "the ONNX Runtime GenAI builder did not follow `prune_lm_head`", where=f"logits: {logits.shape}"
        )
