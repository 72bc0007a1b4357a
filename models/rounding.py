"""Computing as an engine does that rounds activations: the inputs of linear layers, and keys and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F  # noqa: N812  (the field's customary name)
from torch import Tensor, nn

from ..core.activations import QuantizedCache, QuantizedInput
from .watch import Interception, input_position

if TYPE_CHECKING:
    from .skeleton import BlockSite, Skeleton


class Rounding(Interception):
    """Rounds what the products and the attention of one block read, inside the context.

    Args:
        addresses: gives the rounding of each product's input by the data pointer of its weight, once weights are there.
        cache: the rounding of keys and values, None when they stay as they are.
    """

    def __init__(self, addresses: Callable[[], Mapping[int, QuantizedInput]], cache: QuantizedCache | None) -> None:
        super().__init__()
        self._make = addresses
        self._addresses: Mapping[int, QuantizedInput] | None = None
        self._cache = cache
        self._last: tuple[Tensor, int, QuantizedInput, Tensor] | None = None

    def arguments(self, func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Round what a product or attention reads."""
        at = input_position(func, args)
        if at is not None:
            if self._addresses is None:
                self._addresses = self._make()
            rounding = self._addresses.get(args[at + 1].data_ptr())
            if rounding is not None:
                return (*args[:at], self._rounded(args[at], rounding), *args[at + 1 :])
        elif func is F.scaled_dot_product_attention and self._cache is not None:
            return (args[0], *self._cache.round(args[1], args[2]), *args[3:])
        return args

    def _rounded(self, values: Tensor, rounding: QuantizedInput) -> Tensor:
        """Round; layers that read the same tensor are given the same, by which they are known to share it."""
        last = self._last
        if last is None or last[0] is not values or last[1] != values._version or last[2] != rounding:
            last = self._last = (values, values._version, rounding, rounding.round(values))
        return last[3]


def round_activations_of(skeleton: Skeleton) -> Callable[[], None]:
    """Make every block round what `skeleton.inputs` and `skeleton.caches` name, now and when they come to name more.

    Returns:
        A function that ends it.
    """
    handles = [handle for site in skeleton.sites for handle in _install(skeleton, site)]

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


def _install(skeleton: Skeleton, site: BlockSite) -> list[Any]:
    entered: list[Rounding] = []

    def addresses() -> dict[int, QuantizedInput]:
        return {
            view.address(skeleton.parameter(view.parameter).data): skeleton.inputs[view.linear.name]
            for view in site.views
            if view.linear.name in skeleton.inputs
        }

    def before(_: nn.Module, __: Any) -> None:
        cache = skeleton.caches.get(site.attention) if site.attention is not None else None
        if cache is not None or any(view.linear.name in skeleton.inputs for view in site.views):
            entered.append(Rounding(addresses, cache))
            entered[-1].__enter__()

    def after(_: nn.Module, __: Any, ___: Any) -> None:
        if entered:
            entered.pop().__exit__(None, None, None)

    return [
        site.module.register_forward_pre_hook(before),
        site.module.register_forward_hook(after, always_call=True),
    ]
