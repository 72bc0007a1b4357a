"""Round the keys and values that attention keeps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from ..core.activations import ActivationGrid, ActivationNumber, QuantizedCache
from ..core.block import Block, Linear
from ..core.errors import LlmoptError, UsageError
from ..core.facts import ModelFacts
from ..core.params import Params
from ..core.passes import BlockPass, Need, PassContext, PassResult
from ..core.target import Target

if TYPE_CHECKING:
    from torch import Tensor


class QuantizeKvParams(Params, frozen=True, kw_only=True):
    """Parameters of `quantize-kv`."""

    number: Annotated[
        Literal["fp8", "int8"], Meta(description="What keys and values are rounded to: e4m3, or 8-bit integers.")
    ] = "fp8"


class QuantizeKv(BlockPass[QuantizeKvParams]):
    """Find scales for keys and values, so that engines keep them in 8 bits: a cache of half the size.

    One scale for the keys and one for the values of each attention, from their largest magnitude over the calibration
    samples. Every later block sees the rounded keys and values of the ones before it.
    """

    name = "quantize-kv"
    needs = frozenset({Need.CALIBRATION})
    not_after = frozenset({"quantize-kv"})
    Params = QuantizeKvParams

    def cache_number(self) -> ActivationNumber:
        """Return what keys and values are rounded to."""
        return self.params.number

    def check(self, facts: ModelFacts, target: Target) -> None:  # noqa: ARG002
        """Refuse a model that keeps no keys and values of its own text, or two kinds of them."""
        if facts.config.get("is_encoder_decoder") or not (facts.architecture or "").endswith("ForCausalLM"):
            raise UsageError(
                f"`{self.name}` is for decoder language models",
                where=f"architecture {facts.architecture or 'unknown'}",
                hint=f"leave `{self.name}` out",
            )

    def run_block(self, block: Block, linears: Iterable[Linear], context: PassContext) -> PassResult:  # noqa: ARG002
        """Fix the scales of the block's attention."""
        import torch

        from .numerics.observers import Span, of_range

        keys, values = Span(), Span()

        def look(key: Tensor, value: Tensor) -> None:
            keys.add(key.flatten(1))
            values.add(value.flatten(1))

        block.collect_cache(look)
        if block.attention is None or not keys.tokens:
            raise LlmoptError(
                f"cannot find the keys and values of `{block.name}`",
                where="its attention is not torch's scaled_dot_product_attention, or there is more than one",
                hint=f"leave `{self.name}` out",
            )
        grid = ActivationGrid(number=self.params.number, scale="tensor")
        dtype: torch.dtype = getattr(torch, block.dtype)
        key_scale, value_scale = (of_range(grid, span.low, span.high, dtype).scale for span in (keys, values))
        assert key_scale is not None
        assert value_scale is not None
        block.quantize_cache(QuantizedCache(number=self.params.number, key_scale=key_scale, value_scale=value_scale))
        return PassResult(metrics={"attention_count": 1})
