"""Merging adapters into the weights they were trained for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from ..core.adapter import CONFIG, PREFIX, WEIGHTS
from ..core.errors import LlmoptError, UsageError
from ..core.facts import ModelFacts
from ..core.model import ModelHandle
from ..core.params import Params
from ..core.passes import ModelPass, PassContext, PassResult
from ..core.reads import Input
from ..core.target import Target
from ..core.untrusted import MAX_JSON, parse_json, read_json

if TYPE_CHECKING:
    from peft import PeftModel

_HEADER_LENGTH = 8


class MergeAdapterParams(Params, frozen=True, kw_only=True):
    """Parameters of `merge-adapter`."""

    adapters: Annotated[
        tuple[str, ...],
        Meta(min_length=1, description="PEFT folders, each with adapter_config.json and adapter_model.safetensors."),
    ]
    weights: Annotated[
        tuple[float, ...],
        Meta(description="How much of each adapter, in their order; 1 for each when left out. Not for DoRA."),
    ] = ()


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT folder as its files describe it.

    Attributes:
        folder: where it lies.
        config: adapter_config.json.
        shapes: of its tensors, by name.
    """

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def is_dora(self) -> bool:
        """Whether it has a magnitude for each column beside its two matrices (Liu et al., 2024)."""
        return bool(self.config.get("use_dora"))

    def layers(self) -> dict[str, tuple[int, int]]:
        """Return (out_features, in_features) of the layers that it changes, by the path of their module."""
        ends = {name.removeprefix(PREFIX): shape for name, shape in self.shapes.items()}
        return {
            path: (ends[f"{path}.lora_B.weight"][0], shape[1])
            for name, shape in ends.items()
            if name.endswith(".lora_A.weight") and (path := name.removesuffix(".lora_A.weight"))
            if f"{path}.lora_B.weight" in ends
        }


class MergeAdapter(ModelPass[MergeAdapterParams]):
    """Add LoRA adapters to the weights they were trained for (Hu et al., 2021), through peft.

    LoRA, rsLoRA and DoRA, in safetensors only; several one after another, each with its weight. An adapter whose layers
    the model does not have, or has in another size, belongs to another base and is refused.
    """

    name = "merge-adapter"
    before_rounding = True
    Params = MergeAdapterParams

    def inputs(self) -> tuple[Input, ...]:
        """Return the adapters."""
        return tuple(Input("adapter", folder) for folder in self.params.adapters)

    def check(self, facts: ModelFacts, target: Target) -> None:  # noqa: ARG002
        """Refuse adapters that are not there, are pickled, or were trained for another model."""
        weights = self.params.weights
        if weights and len(weights) != len(self.params.adapters):
            raise UsageError(
                f"{len(self.params.adapters)} adapters and {len(weights)} weights",
                where="pass `merge-adapter`",
                hint="give a weight for each adapter, or none",
            )
        found = [read_adapter(Path(folder)) for folder in self.params.adapters]
        for adapter, weight in zip(found, weights or (1.0,) * len(found), strict=True):
            if adapter.is_dora and (weight != 1.0 or len(found) > 1):
                raise UsageError(
                    "a DoRA adapter cannot be weighed or merged with others",
                    where=f"pass `merge-adapter`: `{adapter.folder}` scales the columns of the whole weight",
                    hint="merge it alone, without `weights`",
                )
            check_base(adapter, facts)

    def run(self, model: ModelHandle, context: PassContext) -> tuple[ModelHandle, PassResult]:
        """Merge the adapters."""
        merged: Any = model.materialize()
        weights = self.params.weights or (1.0,) * len(self.params.adapters)
        with context.reporter.step("merge-adapter", len(weights)) as step:
            for folder, weight in zip(self.params.adapters, weights, strict=True):
                merged = _merge(merged, Path(folder), weight)
                step.advance(detail=folder)
        made = model.with_parameters(dict(merged.named_parameters()).get)
        del merged
        changed = _different(model, made)
        return made, PassResult(changed=changed, metrics={"adapters_count": len(weights)})


def read_adapter(folder: Path) -> Adapter:
    """Read what an adapter's files say of it, without its weights.

    Raises:
        UsageError: it is no folder of an adapter, its weights are pickled, or it is no LoRA.
        LlmoptError: a file is damaged.
    """
    where, hint = f"adapter `{folder}`", "give a folder that peft's save_pretrained wrote"
    if not (folder / CONFIG).is_file():
        raise UsageError(f"no adapter at `{folder}`", where=f"there is no {CONFIG} in it", hint=hint)
    if not (folder / WEIGHTS).is_file():
        pickled = any(folder.glob("*.bin"))
        raise UsageError(
            f"`{folder}` holds pickled weights only" if pickled else f"`{folder}` holds no weights",
            where="loading a pickle can run any code" if pickled else f"there is no {WEIGHTS} in it",
            hint="save it again with peft: save_pretrained writes safetensors",
        )
    try:
        config: Any = read_json(folder / CONFIG)
        shapes = _shapes(folder / WEIGHTS)
        kind = str(config.get("peft_type"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LlmoptError(f"`{folder}` is damaged", where=str(error)[:200], hint="fetch the adapter again") from None
    if kind != "LORA":
        raise UsageError(f"adapters of kind {kind} are not known", where=where, hint="LoRA, rsLoRA and DoRA are")
    return Adapter(folder, config, shapes)


def check_base(adapter: Adapter, facts: ModelFacts) -> None:
    """Refuse an adapter whose layers the model does not have, or has in another size.

    Raises:
        UsageError: it names the first of them.
    """
    sizes = {linear.name: (linear.out_features, linear.in_features) for linear in facts.linears}
    base = adapter.config.get("base_model_name_or_path") or "unknown"
    layers = adapter.layers()
    if not layers:
        raise UsageError(
            f"`{adapter.folder}` changes no layer",
            where=f"{len(adapter.shapes)} tensors, none called lora_A with its lora_B",
            hint="give a LoRA adapter",
        )
    for path, size in layers.items():
        known = sizes.get(path) or next(
            (found for name, found in sizes.items() if path.endswith(f".{name}") or name.endswith(f".{path}")), None
        )
        if known is None and _in_blocks(path):
            why = f"`{path}` is not in `{facts.source}`"
        elif known is not None and known != size:
            why = f"`{path}` is {known[0]} x {known[1]} in `{facts.source}`, {size[0]} x {size[1]} in the adapter"
        else:
            continue
        raise UsageError(
            f"`{adapter.folder}` is an adapter for another model",
            where=f"{why}; it was trained for {base}",
            hint="give the model that it was trained for",
        )


def _in_blocks(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes in the header of a safetensors file: its length, then JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_LENGTH), "little")
        header = parse_json(file.read(min(length, MAX_JSON)))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _merge(model: Any, folder: Path, weight: float) -> Any:
    """Return a transformers model with an adapter merged into its weights."""
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(model, str(folder), torch_device="cpu", use_safetensors=True)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UsageError(
            f"`{folder}` cannot be merged",
            where=str(error).strip().splitlines()[0][:200],
            hint="give the model that the adapter was trained for",
        ) from None
    if weight != 1.0:
        _weigh(adapted, weight)
    merged: Any = adapted.merge_and_unload(safe_merge=True)
    return merged


def _weigh(adapted: PeftModel, weight: float) -> None:
    from peft.tuners.lora import LoraLayer

    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(weight)


def _different(before: ModelHandle, after: ModelHandle) -> list[str]:
    import torch

    return [name for name in after.tensor_specs() if not torch.equal(after.read(name), before.read(name))]
