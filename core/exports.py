"""The contract of an exporter. One file in exporters/, one class, one line in the registry."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from .activations import ActivationGrid, ActivationNumber, QuantizedCache, QuantizedInput
from .errors import UsageError
from .facts import ModelFacts
from .graph import Engine
from .model import ModelHandle
from .params import Params
from .progress import Reporter, Silent
from .quantized import Grid

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import onnx_ir as ir
    from torch import Tensor

    from .quantized import QuantizedWeight

P = TypeVar("P", bound=Params)


class ExportableModel(ModelHandle, Protocol):
    """What an exporter may ask of a model beyond its tensors."""

    @property
    def inputs(self) -> Mapping[str, QuantizedInput]:
        """The layers whose inputs are rounded, by checkpoint name, and how."""
        ...

    @property
    def caches(self) -> Mapping[str, QuantizedCache]:
        """The attention modules whose keys and values are rounded, by module path, and how."""
        ...

    def quantized_weight(self, name: str) -> QuantizedWeight:
        """Read one quantized layer from disk."""
        ...

    def tensor_specs(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Return dtype ("float32") and shape of every checkpoint tensor as it will be stored in floating point."""
        ...

    def read(self, name: str) -> Tensor:
        """Return one checkpoint tensor, dequantized where a pass has quantized it."""
        ...

    def linear_modules(self) -> Mapping[str, str | None]:
        """Return the model's linear modules: module path to checkpoint name, None for one tied to another tensor."""
        ...

    def materialize(self, dtype: str = "float32") -> Any:
        """Return the transformers model, whole, in memory, quantized weights dequantized, in eval mode."""
        ...

    def save_side_files(self, directory: Path, *, config_changes: Mapping[str, Any] | None = None) -> None:
        """Write config.json (with changes), generation config, tokenizer and processor files."""
        ...


@dataclass(slots=True)
class ExportResult:
    """What an exporter wrote.

    Attributes:
        notes: sentences for the user and the manifest.
        rounded: `GraphModel.rounded`.
    """

    notes: list[str] = field(default_factory=list[str])
    rounded: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ExportContext:
    """What an exporter may use beside the model."""

    reporter: Reporter = field(default_factory=Silent)


class Exporter(Generic[P]):
    """A format."""

    name: ClassVar[str]
    runtime: ClassVar[str]
    """The entry of runtimes/ that opens the artifact for verification."""
    Params: ClassVar[type[Params]]

    def __init__(self, params: P) -> None:
        self.params = params

    def opened_in(self) -> str:
        """Return the entry of runtimes/ that opens the artifact: `runtime`, unless the parameters decide."""
        return self.runtime

    def check(self, facts: ModelFacts, grid: Grid | None) -> None:
        """Refuse what the format or its runtime cannot hold, from the outline alone.

        Args:
            facts: the model's outline; of the linear layers those that the passes quantize, if they quantize any.
            grid: the grid the passes put weights on, None for a floating-point model.

        Raises:
            UsageError: with the nearest that can.
        """

    def check_activations(
        self,
        grids: Collection[Grid],  # noqa: ARG002
        inputs: ActivationGrid | None,
        cache: ActivationNumber | None,
    ) -> None:
        """Refuse rounded activations, where the format has no words for them.

        Args:
            grids: every grid that weights are put on.
            inputs: how the inputs of layers are rounded, None when they are not.
            cache: what keys and values are rounded to, None when they are not.

        Raises:
            UsageError: with the nearest that can.
        """
        if inputs is not None or cache is not None:
            raise UsageError(
                f"`{self.name}` cannot hold quantized activations",
                where=f"inputs of layers in {inputs}" if inputs else f"keys and values in {cache}",
                hint="use --export safetensors, or leave the activations in floating point (a scheme such as w8a16)",
            )

    def check_adapter(self) -> None:
        """Refuse an adapter beside the weights, where the format has no place for one.

        Raises:
            UsageError: with the nearest that can.
        """
        raise UsageError(
            f"`{self.name}` cannot hold an adapter",
            where="adapters over quantized layers are not merged, but kept beside them",
            hint="use --export safetensors, or leave the adapter out: without lora_rank, `distill` lets the weights "
            "themselves learn on their grids",
        )

    def check_grids(self, grids: Collection[Grid]) -> None:
        """Refuse weights on several grids, where the format has no words for that.

        Args:
            grids: every grid that a layer is put on, or may be.

        Raises:
            UsageError: with the nearest that can.
        """

    def export(self, model: ExportableModel, directory: Path, context: ExportContext) -> ExportResult:
        """Write the artifact's files into `directory`, which exists and is empty."""
        raise NotImplementedError

    def weights_equal(self, model: ExportableModel, directory: Path) -> bool | None:
        """Read the artifact back and compare every quantized weight with the model's, bit for bit.

        Returns:
            None when nothing in the artifact is quantized.
        """
        raise NotImplementedError


class GraphExporter(Exporter[P]):
    """A format that holds an ONNX graph. Between its steps the passes run that work on graphs."""

    engine: ClassVar[Engine]
    late: ClassVar[frozenset[str]] = frozenset()
    """Parameters that the graph does not depend on before it is saved."""

    def default_passes(self) -> tuple[str, ...]:
        """Return the graph passes to run where the recipe names none."""
        return ()

    def trace(self, model: ExportableModel) -> ir.Model:
        """Return the model's graph in floating point, its attention as `llmopt.Attention` nodes.

        Raises:
            LlmoptError: the model cannot be traced.
        """
        raise NotImplementedError

    def carry_codes(self, graph: ir.Model, model: ExportableModel) -> list[str]:
        """Put the quantized layers' codes into the graph and return notes for the user.

        Raises:
            LlmoptError: a quantized layer is not found in the graph.
        """
        raise NotImplementedError

    def save(self, graph: ir.Model, model: ExportableModel, directory: Path) -> list[str]:
        """Write the finished graph and the model's side files; return notes for the user."""
        raise NotImplementedError

    def weights_equal(self, model: ExportableModel, directory: Path, *, rounded: Collection[str] = ()) -> bool | None:
        """Read the artifact back and compare every quantized weight bit for bit.

        Args:
            model: the model that was exported.
            directory: the artifact.
            rounded: hashes of the codes and scales that passes on the graph gave further weights.

        Returns:
            None when nothing in the artifact is quantized.
        """
        raise NotImplementedError

    def export(self, model: ExportableModel, directory: Path, context: ExportContext) -> ExportResult:
        """Write the model as it is traced, without any pass."""
        del context
        graph = self.trace(model)
        notes = self.carry_codes(graph, model)
        return ExportResult(notes + self.save(graph, model, directory))
