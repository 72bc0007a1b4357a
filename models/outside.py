"""What lies outside the blocks (embeddings, final norm, head), in memory only when it is used.

A large embedding or head keeps the dtype it is stored in: rows are looked up and then widened, the head multiplies
slice by slice. In float32 and whole it would be the largest thing in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's customary name)
from torch import Tensor, nn

from .skeleton import Skeleton

_LARGE = 1 << 24
_SLICE = 1 << 22
"""A matrix of more weights than the first is not widened whole, but in parts of about the second."""


class _Outside:
    """The outside modules of one skeleton and what of them is loaded."""

    def __init__(self, skeleton: Skeleton, read: Callable[[str], Tensor]) -> None:
        self._skeleton = skeleton
        self._read = read
        self._loaded: set[str] = set()
        self.names: dict[nn.Module, list[str]] = {}
        outside = set(skeleton.outside)
        for path, module in skeleton.model.named_modules():
            own = [f"{path}.{key}" if path else key for key, _ in module.named_parameters(recurse=False)]
            own = [name for name in own if skeleton.canonical(name) in outside]
            if own:
                self.names[module] = own
        self._narrow = {module for module in self.names if _is_large(module)}
        for module in self._narrow:
            module.forward = _narrow_forward(module)

    def before(self, module: nn.Module, _: Any) -> None:
        """Load a module that is about to compute."""
        names = self.names[module]
        if all(name in self._loaded for name in names):
            return
        self._skeleton.load(names, self._read, widen=module not in self._narrow)
        self._loaded.update(names)

    def after(self, module: nn.Module, _: Any, __: Any) -> None:
        """Free a module that has computed."""
        self._free(self.names[module])

    def close(self) -> None:
        """Free everything and give the modules their own forward back."""
        self._free(self._loaded)
        for module in self._narrow:
            del module.forward

    def _free(self, names: Iterable[str]) -> None:
        wanted = self._loaded.intersection(names)
        self._skeleton.unload(wanted)
        self._loaded -= wanted


@contextmanager
def outside_on_demand(skeleton: Skeleton, read: Callable[[str], Tensor], *, keep: bool = True) -> Iterator[None]:
    """Load what lies outside the blocks when it is used.

    Args:
        skeleton: the model.
        read: gives a checkpoint tensor by name.
        keep: free it at the end, rather than as soon as its module has computed.
    """
    outside = _Outside(skeleton, read)
    handles = [module.register_forward_pre_hook(outside.before) for module in outside.names]
    if not keep:
        handles += [module.register_forward_hook(outside.after) for module in outside.names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        outside.close()


def _is_large(module: nn.Module) -> bool:
    """Return whether a module is a plain Linear or Embedding with a large weight; a subclass may compute otherwise."""
    return type(module) in (nn.Linear, nn.Embedding) and module.get_parameter("weight").numel() > _LARGE


def _narrow_forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a forward that computes in float32 with a weight that is stored narrower."""
    if isinstance(module, nn.Embedding):
        return lambda ids: F.embedding(ids, module.weight, module.padding_idx).float()
    assert isinstance(module, nn.Linear)

    def multiply(tensor: Tensor) -> Tensor:
        rows = max(1, _SLICE // module.in_features)
        parts = [F.linear(tensor, part.float()) for part in module.weight.split(rows)]
        made = torch.cat(parts, -1)
        return made if module.bias is None else made + module.bias.float()

    return multiply
