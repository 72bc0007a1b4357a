"""The model that was exported, computed block by block: what an artifact is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..core.adapter import Adapter, names
from ..core.errors import LlmoptError
from .handle import TorchModel
from .outside import outside_on_demand
from .skeleton import BlockSite, Skeleton


def reference_outputs(model: TorchModel, inputs: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Run the model as the passes left it; see `streamed_outputs`."""
    return streamed_outputs(model.skeleton(), model.widened, inputs)


def adapted_outputs(
    model: TorchModel, inputs: Sequence[dict[str, Tensor]], *, read: Callable[[str], Tensor] | None = None
) -> list[dict[str, Tensor]]:
    """Run the model with the adapter beside its weights; see `streamed_outputs`.

    Args:
        model: it has an adapter.
        inputs: batches by input name.
        read: gives a checkpoint tensor by name; those of the model when left out.
    """
    assert model.adapter is not None, "asked for where there is one"
    skeleton = model.skeleton()
    with adapted(skeleton.model, model.adapter):
        return streamed_outputs(skeleton, read or model.widened, inputs)


@contextmanager
def adapted(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Let the layers of a model add what an adapter says; its tensors are in memory while a layer computes."""
    with ExitStack() as stack:
        file = stack.enter_context(safe_open(adapter.file, framework="pt"))
        for layer in adapter.layers:

            def add(_: nn.Module, arguments: Any, output: Tensor, layer: str = layer) -> Tensor:
                down, up = (file.get_tensor(name) for name in names(layer))
                return output + adapter.scale * (arguments[0] @ down.T) @ up.T

            stack.callback(model.get_submodule(layer).register_forward_hook(add).remove)
        yield


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
