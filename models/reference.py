"""The model that was exported, computed block by block: what an artifact is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .handle import TorchModel
from .skeleton import BlockSite, Skeleton


def reference_outputs(model: TorchModel, inputs: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Run the model on each batch, every block's weights in memory only while it computes.

    Args:
        model: the model as the passes left it.
        inputs: batches by input name.

    Returns:
        For each batch its floating-point outputs by name: `logits`, or `last_hidden_state` and others.
    """
    skeleton = model.skeleton()
    outputs: list[dict[str, Tensor]] = []
    with _streamed(skeleton, model), torch.no_grad():
        for batch in inputs:
            made = skeleton.model(**batch, return_dict=True)
            outputs.append({name: value for name, value in made.items() if isinstance(value, Tensor)})
    return outputs


@contextmanager
def _streamed(skeleton: Skeleton, model: TorchModel) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(skeleton.outside_on_demand(model.read))
        for site in skeleton.sites:
            before, after = _hooks(skeleton, model, site)
            stack.callback(site.module.register_forward_pre_hook(before).remove)
            stack.callback(site.module.register_forward_hook(after, always_call=True).remove)
        yield


def _hooks(skeleton: Skeleton, model: TorchModel, site: BlockSite) -> tuple[Any, Any]:
    def before(_: nn.Module, __: Any) -> None:
        skeleton.load(site.parameters, model.read)

    def after(_: nn.Module, __: Any, ___: Any) -> None:
        skeleton.unload(site.parameters)

    return before, after
