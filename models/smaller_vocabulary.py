"""A model with fewer tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import UsageError
from .cuts import nested_settings
from .producers import same
from .reference import streamed_outputs
from .text import proof_batches
from .width import channels

if TYPE_CHECKING:
    from .handle import TorchModel


def with_vocabulary(
    model: TorchModel,
    kept: Sequence[int],
    config: Mapping[str, Any],
    *,
    side_files: Callable[[Path], None],
    seed: int,
) -> TorchModel:
    """Return the model with fewer tokens; see `core.model.ModelHandle`."""
    found = channels(model, ["vocabulary"], seed=seed)
    (tokens,) = found.sets
    order = {tokens.name: torch.tensor(kept)}
    changes = {**config}
    changes |= nested_settings({**model.facts.config, **config}, {tokens.size: len(kept)})
    tensors = ((name, found.changed(name, model.read(name), order)) for name in model.tensor_specs())
    smaller: TorchModel = model.rewritten(tensors, changes, side_files=side_files)
    _prove(model, smaller, kept, seed)
    return smaller


def _prove(model: TorchModel, smaller: TorchModel, kept: Sequence[int], seed: int) -> None:
    """Show that the model answers as before, for the tokens that are left.

    Raises:
        UsageError: it does not, as where positions are counted from the id of the padding.
    """
    skeleton = smaller.skeleton()
    inputs = proof_batches(skeleton, seed)
    order = torch.tensor(kept)
    before = [{name: order[ids] for name, ids in batch.items()} for batch in inputs]
    for old, new in zip(
        streamed_outputs(model.skeleton(), model.widened, before),
        streamed_outputs(skeleton, smaller.widened, inputs),
        strict=True,
    ):
        for name, value in new.items():
            expected = old[name]
            if expected.shape != value.shape:
                expected = expected.index_select(-1, order)
            if not same(expected, value):
                raise UsageError(
                    f"the vocabulary of {type(skeleton.model).__name__} cannot be pruned",
                    where=f"`{name}` is not what it was for the tokens that are left",
                    hint="leave `prune-vocab` out",
                )
