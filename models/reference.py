"""The model that was exported, computed block by block: what an artifact is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import LlmoptError
from .handle import TorchModel
from .outside import outside_on_demand
from .skeleton import BlockSite, Skeleton


def reference_outputs(model: TorchModel, inputs: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Run the model as the passes left it; see `streamed_outputs`."""
    return streamed_outputs(model.skeleton(), model.widened, inputs)


def streamed_outputs(
    skeleton: Skeleton, read: Callable[[str], Tensor], inputs: Sequence[dict[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """Run a model on each batch, every block's weights in memory only while it computes.

    Args:
        skeleton: the model without weights.
        read: gives a checkpoint tensor by name.
        inputs: batches by input name.

    Returns:
        For each batch its floating-point outputs by name: `logits`, or `last_hidden_state` and others.
    """
    outputs: list[dict[str, Tensor]] = []
    with _streamed(skeleton, read), torch.no_grad():
        for batch in inputs:
            made = skeleton.model(**batch, return_dict=True)
            outputs.append({name: value for name, value in made.items() if isinstance(value, Tensor)})
    return outputs


@contextmanager
def _streamed(skeleton: Skeleton, read: Callable[[str], Tensor]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(outside_on_demand(skeleton, read, keep=False))
        for site in skeleton.sites:
            before, after = _hooks(skeleton, read, site)
            stack.callback(site.module.register_forward_pre_hook(before).remove)
            stack.callback(site.module.register_forward_hook(after, always_call=True).remove)
        yield


def _hooks(skeleton: Skeleton, read: Callable[[str], Tensor], site: BlockSite) -> tuple[Any, Any]:
    def before(_: nn.Module, __: Any) -> None:
        skeleton.load(site.parameters, read)

    def after(_: nn.Module, __: Any, output: Any) -> None:
        skeleton.unload(site.parameters)
        states = output[0] if isinstance(output, tuple) else output
        if isinstance(states, Tensor) and not bool(torch.isfinite(states).all()):
            raise LlmoptError(
                f"the output of `{site.name}` holds NaN or Inf",
                where="the model was run block by block in float32, to compare artifacts with it",
                hint="the model overflows: check its weights",
            )

    return before, after
