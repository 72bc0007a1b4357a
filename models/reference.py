"""The model that was exported, computed block by block: what an artifact is compared with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's customary name)
from safetensors import safe_open
from torch import Tensor, nn

from ..core.adapter import Adapter, names
from ..core.errors import LlmoptError
from .handle import TorchModel
from .outside import outside_on_demand
from .skeleton import BlockSite, Skeleton, View
from .store import dequantized_rows


def reference_outputs(model: TorchModel, inputs: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Run the model as the passes left it; see `streamed_outputs`."""
    skeleton = model.skeleton()
    with _multiplied_by_rows(skeleton, model) as multiplied:
        return streamed_outputs(skeleton, model.widened, inputs, without=multiplied)


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
    skeleton: Skeleton,
    read: Callable[[str], Tensor],
    inputs: Sequence[dict[str, Tensor]],
    *,
    without: Collection[str] = (),
) -> list[dict[str, Tensor]]:
    """Run a model on each batch, every block's weights in memory only while it computes.

    Args:
        skeleton: the model without weights.
        read: gives a checkpoint tensor by name.
        inputs: batches by input name.
        without: parameters of the blocks that need not be loaded.

    Returns:
        For each batch its floating-point outputs by name: `logits`, or `last_hidden_state` and others.
    """
    outputs: list[dict[str, Tensor]] = []
    with _streamed(skeleton, read, without), torch.no_grad():
        for batch in inputs:
            made = skeleton.model(**batch, return_dict=True)
            outputs.append({name: value for name, value in made.items() if isinstance(value, Tensor)})
    return outputs


@contextmanager
def _streamed(skeleton: Skeleton, read: Callable[[str], Tensor], without: Collection[str]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(outside_on_demand(skeleton, read, keep=False))
        for site in skeleton.sites:
            before, after = _hooks(skeleton, read, site, [name for name in site.parameters if name not in without])
            stack.callback(site.module.register_forward_pre_hook(before).remove)
            stack.callback(site.module.register_forward_hook(after, always_call=True).remove)
        yield


def _hooks(
    skeleton: Skeleton, read: Callable[[str], Tensor], site: BlockSite, parameters: Sequence[str]
) -> tuple[Any, Any]:
    def before(_: nn.Module, __: Any) -> None:
        skeleton.load(parameters, read)

    def after(_: nn.Module, __: Any, output: Any) -> None:
        skeleton.unload(parameters)
        states = output[0] if isinstance(output, tuple) else output
        if isinstance(states, Tensor) and not bool(torch.isfinite(states).all()):
            raise LlmoptError(
                f"the output of `{site.name}` holds NaN or Inf",
                where="the model was run block by block in float32, to compare artifacts with it",
                hint="the model overflows: check its weights",
            )

    return before, after


@contextmanager
def _multiplied_by_rows(skeleton: Skeleton, model: TorchModel) -> Iterator[set[str]]:
    """Let quantized layers multiply with their rows as these are dequantized, and yield the parameters of those layers.

    Dequantized whole they would be written to memory and read again, which takes as long as multiplying does.
    """
    with ExitStack() as stack:
        multiplied: set[str] = set()
        for view in (view for site in skeleton.sites for view in site.views):
            module = skeleton.model.get_submodule(view.parameter.rpartition(".")[0])
            if view.parameter not in multiplied and _is_row_by_row(view, skeleton, model):
                module.forward = _by_rows(module, view.linear.name, model)
                stack.callback(delattr, module, "forward")
                multiplied.add(view.parameter)
        yield multiplied


def _is_row_by_row(view: View, skeleton: Skeleton, model: TorchModel) -> bool:
    """Return whether a quantized layer is the whole weight of a Linear, row for row, and its inputs are not rounded."""
    if type(skeleton.model.get_submodule(view.parameter.rpartition(".")[0])) is not nn.Linear:
        return False
    layer = view.linear.name
    as_stored = layer in model.quantized and layer not in model.store.transposed and layer not in skeleton.inputs
    return as_stored and view.rows is None and not view.transposed


def _by_rows(module: nn.Module, layer: str, model: TorchModel) -> Callable[[Tensor], Tensor]:
    assert isinstance(module, nn.Linear)

    def multiply(tensor: Tensor) -> Tensor:
        weight = model.quantized_weight(layer)
        made = torch.cat([F.linear(tensor, part.float()) for _, part in dequantized_rows(weight)], -1)
        return made if module.bias is None else made + module.bias

    return multiply
