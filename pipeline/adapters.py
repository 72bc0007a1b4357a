"""The difference of two models as a LoRA adapter, which serving engines load beside their base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import names, peft_config
from ..core.errors import UsageError
from ..core.manifest import MANIFEST
from ..core.progress import Reporter
from ..core.recipe import ModelSpec
from ..exporters.adapter_folder import write_adapter
from ..models.checkpoint import Checkpoint
from ..models.handle import TorchModel
from ..models.locate import locate
from ..models.outline import outline
from ..passes.numerics.low_rank import factors, length
from .output import file_records, readable, staging


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer of both models: its name in the checkpoint, the path of its module, and which way round it lies."""

    name: str
    path: str
    transposed: bool


def extract_adapter(
    tuned: ModelSpec, base: ModelSpec, *, rank: int, output: Path, force: bool, reporter: Reporter
) -> dict[str, Any]:
    """Write the difference of `tuned` from `base` as a PEFT folder at `output`.

    Only one layer of both models is in memory at a time. The adapter is read again and compared with what was written.

    Args:
        tuned: the model that was trained further.
        base: the model that it was.
        rank: of the difference, at most; a smaller matrix is kept whole.
        output: the folder to write; appears whole or not at all.
        force: replace a former one.
        reporter: shown progress.

    Returns:
        What was made: `layers_count`, `rank_count`, `error_max_ratio` (what the rank leaves out of a layer's
        difference, as a share of its norm), `skipped` (tensors that differ and that no LoRA can hold), `files`.

    Raises:
        UsageError: the models do not have the same layers, or do not differ.
    """
    inputs = [path for spec in (tuned, base) if (path := Path(spec.id).expanduser()).exists()]
    with staging(output, force=force, inputs=inputs) as stage:
        new, old = (_opened(spec, stage.work / name) for spec, name in ((tuned, "tuned"), (base, "base")))
        _check_alike(new, old)
        layers = list(_layers(old))
        tensors: dict[str, Tensor] = {}
        errors: dict[str, float] = {}
        with reporter.step("extracting the adapter", len(layers)) as step:
            for layer in layers:
                error = _extract(layer, new, old, rank, tensors)
                if error is not None:
                    errors[layer.path] = error
                step.advance(detail=layer.name)
        if not errors:
            raise UsageError(
                f"`{tuned.id}` and `{base.id}` have the same layers, bit for bit",
                where=f"{len(layers)} layers",
                hint="give the model that was trained further, and the one that it was",
            )
        skipped = _others(new, old, {f"{layer.name}.weight" for layer in layers})
        for name in skipped:
            reporter.warn(f"`{name}` differs too, and no adapter of linear layers holds it")
        transposed = any(layer.transposed for layer in layers)
        config = peft_config(list(errors), rank=rank, alpha=rank, transposed=transposed, base=base.id)
        write_adapter(stage.root, tensors, config)
        report: dict[str, Any] = {
            "layers_count": len(errors),
            "rank_count": rank,
            "error_max_ratio": max(errors.values()),
            "skipped": skipped,
            "tuned": tuned.id,
            "base": base.id,
        }
        files = {name: [one.bytes, one.sha256] for name, one in file_records(stage.root).items()}
        document = {"adapter": report, "files": files}
        (stage.root / MANIFEST).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        readable(stage.root)
        stage.commit()
    return {**report, "files": files}


def _opened(spec: ModelSpec, work: Path) -> TorchModel:
    location = locate(spec)
    if location.graph is not None:
        raise UsageError(f"`{spec.id}` is an ONNX graph", hint="give the folder that holds its safetensors")
    checkpoint = Checkpoint(location.folder)
    return TorchModel.create(location, checkpoint, outline(location, checkpoint), work)


def _check_alike(new: TorchModel, old: TorchModel) -> None:
    """Refuse models whose layers have other names or sizes."""
    sizes = [{one.name: (one.out_features, one.in_features) for one in model.facts.linears} for model in (new, old)]
    different = sorted(name for name in {*sizes[0], *sizes[1]} if sizes[0].get(name) != sizes[1].get(name))
    if different:
        mine, other = sizes[0].get(different[0]), sizes[1].get(different[0])
        raise UsageError(
            f"`{new.location.source}` was not made from `{old.location.source}`",
            where=f"`{different[0]}` is {_size(mine)} in the one, {_size(other)} in the other",
            hint="give the model that was trained further, and the one that it was",
        )


def _size(size: tuple[int, int] | None) -> str:
    return "missing" if size is None else f"{size[0]} x {size[1]}"


def _layers(model: TorchModel) -> Iterator[_Layer]:
    """Yield the linear layers that are a parameter of their own."""
    targets = {
        binding.sources[0][0]: target
        for target, binding in model.skeleton().naming.of_target.items()
        if binding.converter is None
    }
    for linear in model.facts.linears:
        target = targets.get(f"{linear.name}.weight")
        if target is not None:
            yield _Layer(linear.name, target.removesuffix(".weight"), linear.transposed)


def _extract(layer: _Layer, new: TorchModel, old: TorchModel, rank: int, tensors: dict[str, Tensor]) -> float | None:
    """Add a layer's two matrices, and return what they leave out; None when the layer does not differ."""
    name = f"{layer.name}.weight"
    difference = new.read(name).float() - old.read(name).float()
    if not bool(difference.any()):
        return None
    if layer.transposed:
        difference = difference.T
    up, down = factors(difference, rank)
    tensors |= dict(zip(names(layer.path), (down, up), strict=True))
    return length(difference - up @ down) / length(difference)


def _others(new: TorchModel, old: TorchModel, layers: set[str]) -> list[str]:
    """Return the tensors outside the layers that differ."""
    shared = [name for name in new.checkpoint.tensors if name not in layers]
    return [
        name
        for name in shared
        if name not in old.checkpoint.tensors or not torch.equal(new.read(name).float(), old.read(name).float())
    ]
