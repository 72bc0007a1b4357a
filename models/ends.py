"""What reads and writes the residual stream outside the blocks: embeddings, the last norm, the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from .residual import Norms, reader_of, refusal
from .skeleton import Skeleton
from .watch import NormCall, norm_calls


@dataclass(slots=True)
class Ends:
    """What of the stream lies outside the blocks, by parameter.

    Attributes:
        embeddings: tables whose rows begin the stream.
        readers: weight of a layer -> what the norm before it multiplies by, None when that is the same everywhere.
        norms: weight of a folded norm -> the value that makes it multiply by 1.
        must_untie: an embedding and a reader share a weight, and a norm is folded into the latter.
        untied: the new tensor, once it is there.
    """

    embeddings: list[str]
    readers: dict[str, Tensor | None]
    norms: dict[str, float]
    must_untie: bool
    untied: str | None = None


def find_ends(skeleton: Skeleton, run: Callable[[], object], width: int) -> Ends:
    """Return what reads and writes the stream outside the blocks; `run` computes it once, the blocks left out."""
    calls: list[NormCall] = []
    tables: list[str] = []
    inputs: dict[str, Tensor] = {}
    handles: list[Any] = []
    outside = [
        (path, module)
        for path, module in skeleton.model.named_modules()
        if any(skeleton.canonical(f"{path}.{key}") in skeleton.outside for key in module._parameters)
    ]
    for path, module in outside:
        if isinstance(module, nn.Embedding) and module.embedding_dim == width:
            handles.append(module.register_forward_hook(lambda _, __, ___, path=path: tables.append(path)))
        elif isinstance(module, nn.Linear) and module.in_features == width:
            keep = partial(_keep_input, inputs, path)
            handles.append(module.register_forward_pre_hook(keep))
    try:
        with norm_calls(outside, calls.append):
            run()
    finally:
        for handle in handles:
            handle.remove()
    norms, found = Norms(skeleton), Ends([f"{path}.weight" for path in dict.fromkeys(tables)], {}, {}, must_untie=False)
    for path, tensor in inputs.items():
        call = reader_of(tensor, calls)
        if call is None:
            raise refusal(skeleton, f"`{path}` reads the stream, or something as wide, past the last norm")
        norm = norms.norm(call)
        found.readers[f"{path}.weight"] = norm.multiplier
        if norm.multiplier is not None:
            found.norms[f"{norm.path}.weight"] = norm.one
    _check_ends(skeleton, found, width)
    begun = {skeleton.canonical(name) for name in found.embeddings}
    found.must_untie = any(
        skeleton.canonical(name) in begun and multiplier is not None for name, multiplier in found.readers.items()
    )
    return found


def _check_ends(skeleton: Skeleton, ends: Ends, width: int) -> None:
    """Refuse a model without a head, and one with matrices that text alone does not come to (a projector of images)."""
    if not ends.readers:
        raise refusal(skeleton, "no layer reads its last norm: the stream itself is the model's output")
    known = {skeleton.canonical(name) for name in (*ends.embeddings, *ends.readers)}
    shapes = {name: skeleton.parameter(name).shape for name in skeleton.outside}
    wide = [name for name, shape in shapes.items() if len(shape) >= 2 and width in shape]
    unseen = [name for name in wide if name not in known]
    if unseen:
        raise refusal(skeleton, f"`{unseen[0]}` is as wide as the stream, and no product with it was seen")


def _keep_input(inputs: dict[str, Tensor], path: str, _: nn.Module, args: tuple[Any, ...]) -> None:
    inputs[path] = args[0]
