"""Hugging Face checkpoints: plain, or the codes packed in one of several layouts (see layouts/)."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from ..core.activations import ActivationGrid, ActivationNumber
from ..core.adapter import FOLDER
from ..core.errors import LlmoptError, UsageError
from ..core.exports import ExportableModel, ExportContext, Exporter, ExportResult
from ..core.facts import ModelFacts
from ..core.params import Params
from ..core.quantized import Grid, QuantizedWeight
from .adapter_folder import same_adapter, write_adapter
from .layouts import LAYOUTS
from .layouts.layout import Layout, grids_refusal
from .shards import ShardWriter, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class SafetensorsParams(Params, frozen=True, kw_only=True):
    """Parameters of `safetensors`."""

    format: Annotated[
        Literal["auto", "plain", "compressed-tensors", "gptq", "gptq_v2", "awq"],
        Meta(
            description="`plain` writes floating-point weights (quantized ones dequantized); the others pack codes: "
            "`compressed-tensors` for transformers and vLLM, `gptq` (symmetric, 2, 3, 4 or 8 bits), `gptq_v2` (those, "
            "asymmetric too) and `awq` (4 bits) for engines that read such checkpoints; `auto` is "
            "`compressed-tensors` when the model is quantized."
        ),
    ] = "auto"
    max_shard_gb: Annotated[float, Meta(gt=0, description="Size at which a new shard is begun, in GB (10^9).")] = 5.0


class Safetensors(Exporter[SafetensorsParams]):
    """A Hugging Face folder; quantized weights as compressed-tensors, GPTQ or AWQ.

    transformers opens plain and compressed-tensors folders. GPTQ and AWQ folders, for which it needs the package
    gptqmodel, are opened by llmopt's own reader of the packed codes. An adapter beside quantized layers goes
    to the folder `adapter`, as peft, vLLM and TGI load it.
    """

    name = "safetensors"
    runtime = "transformers"
    Params = SafetensorsParams

    def opened_in(self) -> str:
        """Return the runtime that opens this format."""
        chosen = self.params.format
        return LAYOUTS.load(chosen).runtime if chosen in LAYOUTS else self.runtime

    def check(self, facts: ModelFacts, grid: Grid | None) -> None:
        """Refuse what the format or its readers cannot hold."""
        layout = self._layout(grid)
        if layout is not None:
            assert grid is not None
            if refused := layout.refusal(facts, grid):
                raise refused
        elif grid is None and self.params.format in LAYOUTS:
            raise UsageError(
                "nothing to pack: no pass quantizes the weights",
                where=f"export `safetensors`, format {self.params.format}",
                hint="add a pass such as rtn or gptq, or use format plain",
            )

    def check_activations(
        self, grids: Collection[Grid], inputs: ActivationGrid | None, cache: ActivationNumber | None
    ) -> None:
        """Refuse rounded activations in a layout without words for them."""
        chosen = "compressed-tensors" if self.params.format == "auto" else self.params.format
        if chosen in LAYOUTS:
            refused = LAYOUTS.load(chosen)().activations_refusal(grids, inputs, cache)
            if refused is not None:
                raise refused
        else:
            super().check_activations(grids, inputs, cache)

    def check_adapter(self) -> None:
        """Take it: it has a folder of its own."""

    def check_grids(self, grids: Collection[Grid]) -> None:
        """Refuse several grids in a layout that has words for one."""
        layout = self._layout(next(iter(grids), None))
        if layout is not None and len(grids) > 1 and not layout.several_grids:
            raise grids_refusal(layout.name, grids)

    def export(self, model: ExportableModel, directory: Path, context: ExportContext) -> ExportResult:
        """Write shards, index, config.json and tokenizer files."""
        layout = self._layout_of(model)
        specs: dict[str, TensorSpec] = {}
        for name, (dtype, shape) in model.tensor_specs().items():
            layer = name.removesuffix(".weight")
            if layout is not None and layer in model.quantized:
                parts = layout.specs(shape, dtype, model.quantized[layer], model.inputs.get(layer))
                specs.update({f"{layer}.{part}": spec for part, spec in parts.items()})
            else:
                specs[name] = TensorSpec(f"torch.{dtype}", shape)
        others = layout.others(model) if layout is not None else {}
        specs.update({name: TensorSpec(str(tensor.dtype), tuple(tensor.shape)) for name, tensor in others.items()})
        if layout is not None:
            _check_names(layout, model)
        changes = {"quantization_config": layout.config(model)} if layout is not None else None
        limit = int(self.params.max_shard_gb * 10**9)
        with (
            ShardWriter(directory, specs, max_shard_bytes=limit) as writer,
            context.reporter.step("writing safetensors", len(model.tensor_specs())) as step,
        ):
            for name, value in model.tensors():
                if isinstance(value, QuantizedWeight) and layout is not None:
                    inputs = model.inputs.get(name)
                    dtype = str(value.scale.dtype).removeprefix("torch.")
                    for part, tensor in (layout.pack(value, inputs) | layout.input_parts(inputs, dtype)).items():
                        writer.write(f"{name}.{part}", tensor)
                elif isinstance(value, QuantizedWeight):
                    writer.write(f"{name}.weight", model.read(f"{name}.weight"))
                else:
                    writer.write(name, value)
                del value  # before the next is read: two embeddings at once may be more than a block
                step.advance(detail=name)
            for name, tensor in others.items():
                writer.write(name, tensor)
        model.save_side_files(directory, config_changes=changes)
        result = ExportResult(notes=layout.notes(model) if layout is not None else [])
        if model.adapter is not None:
            (directory / FOLDER).mkdir()
            write_adapter(directory / FOLDER, model.adapter_tensors(), model.adapter.config())
            result.notes.append(
                f"an adapter of rank {model.adapter.rank} lies in `{FOLDER}`, beside its base: without it the artifact "
                "is the quantized model alone, whose answers `llmopt verify` compares"
            )
        return result

    def adapter_equal(self, model: ExportableModel, directory: Path) -> bool:
        """Read the adapter back and compare it with the model's, bit for bit."""
        assert model.adapter is not None, "asked for where there is one"
        return same_adapter(directory / FOLDER, model.adapter_tensors(), model.adapter.config())

    def weights_equal(self, model: ExportableModel, directory: Path) -> bool | None:
        """Unpack every quantized layer and compare codes, scales and zero points bit for bit.

        So too the scales of activations.
        """
        layout = self._layout_of(model)
        if layout is None:
            return None
        shards = _shards(directory)
        others = layout.others(model)
        if not all(_read(directory, shards, name).equal(tensor) for name, tensor in others.items()):
            return False
        specs = model.tensor_specs()
        for layer, grid in model.quantized.items():
            dtype, shape = specs[f"{layer}.weight"]
            inputs = model.inputs.get(layer)
            names = layout.specs(shape, dtype, grid, inputs)
            parts = {part: _read(directory, shards, f"{layer}.{part}") for part in names}
            known = layout.input_parts(inputs, dtype)
            if not all(parts[part].equal(tensor) for part, tensor in known.items()):
                return False
            if not _equal(layout.unpack(parts, grid, dtype), model.quantized_weight(layer)):
                return False
        return True

    def _layout(self, grid: Grid | None) -> Layout | None:
        """Return the layout that weights on `grid` are packed in, None when nothing is packed."""
        if grid is None or self.params.format == "plain":
            return None
        return LAYOUTS.load("compressed-tensors" if self.params.format == "auto" else self.params.format)()

    def _layout_of(self, model: ExportableModel) -> Layout | None:
        if model.caches and not model.quantized:
            return LAYOUTS.load("compressed-tensors")()
        return self._layout(next(iter(model.quantized.values()), None))


def _shards(directory: Path) -> Mapping[str, str]:
    """Return the file of every tensor; empty when there is but one."""
    index = directory / "model.safetensors.index.json"
    return json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}


def _read(directory: Path, shards: Mapping[str, str], name: str) -> Tensor:
    from safetensors import safe_open

    file = shards.get(name, "model.safetensors")
    with safe_open(directory / file, framework="pt") as shard:
        if name not in shard.keys():  # noqa: SIM118  (not a dict)
            raise LlmoptError(f"`{name}` is missing from the artifact", where=str(directory / file))
        return shard.get_tensor(name)


def _check_names(layout: Layout, model: ExportableModel) -> None:
    named = model.tensor_specs()
    for layer in model.quantized:
        if f"{layer}.weight" not in named:
            raise LlmoptError(
                f"{layout.name} cannot hold `{layer}`",
                where="the checkpoint stores it as a slice of a 3-D tensor; readers take one matrix a layer",
                hint="use --export safetensors:format=plain, or --export onnx",
            )


def _equal(first: QuantizedWeight, second: QuantizedWeight) -> bool:
    zeros = (first.zero_point, second.zero_point)
    same_zero = zeros == (None, None) or (None not in zeros and bool((zeros[0] == zeros[1]).all()))  # type: ignore[union-attr]
    return (
        first.grid == second.grid
        and same_zero
        and first.codes.equal(second.codes)
        and first.scale.equal(second.scale)
        and (first.divisor is None or (second.divisor is not None and first.divisor.equal(second.divisor)))
    )
