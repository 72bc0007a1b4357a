"""Tracing takes seconds for the smallest of models: in a run of the tests, one model is traced once."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx_ir as ir

LARGEST = 1 << 23
"""Bytes of the models whose graphs are kept."""

_SAID_OTHERWISE = ("_name_or_path", "architectures", "use_cache")
"""Settings of a config that no graph depends on: whether there is a cache, the inputs say."""


class TracedOnce:
    """Stands for `onnx_trace._export`: a model that was traced before, the same to its last bit, is read from a folder.

    Args:
        export: the function that traces.
        folder: where graphs are kept; processes share it.
    """

    def __init__(self, export: Callable[..., ir.Model], folder: Path) -> None:
        self.export, self._folder = export, folder
        folder.mkdir(exist_ok=True)

    def __call__(self, model: Any, inputs: dict[str, Any], shapes: dict[str, Any], opset: int | None) -> ir.Model:
        """Return the graph of a forward pass; the sample inputs and their axes follow from the model."""
        import onnx_ir as ir

        # The code of a forward that is not its class's is not in the hash.
        if any("forward" in vars(part) for part in model.modules()) or _bytes(model) > LARGEST:
            return self.export(model, inputs, shapes, opset)
        given = [sorted(inputs), inputs["use_cache"], opset]
        kept = self._folder / hashlib.sha256(f"{_hash(model)} {given}".encode()).hexdigest()
        if not kept.exists():
            made = kept.with_suffix(f".{os.getpid()}")
            ir.save(self.export(model, inputs, shapes, opset), made)
            made.replace(kept)
        return ir.load(kept).clone()  # shapes that are read are frozen, and the axes get their names yet


def _bytes(model: Any) -> int:
    return sum(value.nbytes for value in model.state_dict().values())


def _hash(model: Any) -> str:
    """Return a hash of a model's class, parts, configs and tensors."""
    import torch

    settings: list[Any] = [type(model), model, model.training]
    for part in model.modules():
        if hasattr(part, "config"):
            config = json.loads(part.config.to_json_string(use_diff=False))
            settings += [sorted((key, repr(value)) for key, value in config.items() if key not in _SAID_OTHERWISE)]
            settings += [part.config._attn_implementation]
    found = hashlib.sha256(repr(settings).encode())
    for name, value in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
