"""What a pass may ask of a block of a model, and of the linear layers in it; `models/` implements it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from .activations import QuantizedCache, QuantizedInput
    from .quantized import QuantizedWeight


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of a block, whatever module class holds it: Linear, Conv1D, a part of a fused or stacked weight.

    Attributes:
        name: the checkpoint's name of its weight, without `.weight`.
        out_features: rows of its weight.
        in_features: columns of its weight.
    """

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class Product:
    """Linear layers that multiply the same input, so that one set of statistics serves them all."""

    linears: tuple[Linear, ...]

    @property
    def in_features(self) -> int:
        """Width of the shared input."""
        return self.linears[0].in_features


Stage = tuple[Product, ...]
"""Products that may be worked on together: none of them feeds another."""


class Block(Protocol):
    """One of the repeated blocks, its weights in memory as float32 for as long as it is worked on."""

    @property
    def name(self) -> str:
        """The module's path, such as `model.layers.3`."""
        ...

    @property
    def linears(self) -> Sequence[Linear]:
        """The linear layers of the block."""
        ...

    @property
    def dtype(self) -> str:
        """The dtype in which the block's weights are stored, and so the dtype of scales, such as "bfloat16"."""
        ...

    def weight(self, linear: Linear) -> Tensor:
        """Return the current weight, (out_features, in_features) float32; not to be written to."""
        ...

    def rows(self, linear: Linear, count: int) -> Iterator[Tensor]:
        """Yield the current weight, (count, in_features) at a time, in the dtype it is held in: float32 or narrower.

        A weight that nobody has asked for whole is not in memory whole.
        """
        ...

    def quantize(self, linear: Linear, weight: QuantizedWeight) -> None:
        """Make `weight` the layer's weight: from now on the block computes with `weight.dequantize()`."""
        ...

    def quantize_input(self, linear: Linear, rounding: QuantizedInput) -> None:
        """Round the layer's input: from now on the block computes with `rounding.round(input)`."""
        ...

    @property
    def attention(self) -> str | None:
        """Path of the module that keeps keys and values, None when there is none, or more than one."""
        ...

    def quantize_cache(self, rounding: QuantizedCache) -> None:
        """Round the keys and values of `attention`: from now on the block computes with `rounding.round(…)`."""
        ...

    def collect_cache(self, receive: Callable[[Tensor, Tensor], None]) -> None:
        """Run the calibration samples through the block and look at keys and values as attention reads them.

        Args:
            receive: called for each batch with keys and values, (rows, heads, tokens, head size) float32; not called
                when the block's attention does not go through torch's scaled dot product.
        """
        ...

    def unrounded(self, linear: Linear) -> Tensor:
        """Return the weight of a quantized layer as it was just before, (out_features, in_features) float32.

        Only where a pass of the sweep needs `Need.UNROUNDED` or `Need.EXACT_INPUTS`.
        """
        ...

    def adaptable(self, linear: Linear) -> str | None:
        """Return the path of the linear module that the layer is; None where it is no such module, or a part of one."""
        ...

    def adapt(self, linear: Linear, down: Tensor, up: Tensor) -> None:
        """Add an adapter to a layer: from now on the block computes with `up @ down` beside the weight, which stays.

        Args:
            linear: one that `adaptable` has a path for.
            down: (rank, in_features) float32.
            up: (out_features, rank) float32.
        """
        ...

    def update(self, linear: Linear, weight: Tensor) -> None:
        """Replace the layer's weight, (out_features, in_features) float32, by another in floating point."""
        ...

    def sparsify(self, linear: Linear, weight: Tensor) -> None:
        """Replace the layer's weight by one whose zeros later passes must leave zeros; see `update`."""
        ...

    def mask(self, linear: Linear) -> Tensor | None:
        """Return where a weight may be other than zero, (out_features, in_features) bool; None for a dense layer."""
        ...

    def channels(self, product: Product) -> Tensor | None:
        """Return which channel of what makes the product's input each input channel comes from.

        Returns:
            (in_features,) int64 with values from 0 to groups - 1: input channels of the same group can only be scaled
            together (the value heads of grouped-query attention feed several input channels each). None when nothing
            before the product can take up a scale.
        """
        ...

    def balance(self, product: Product, factors: Tensor) -> None:
        """Multiply the columns of the product's layers by `factors` and divide what makes their input by them.

        Args:
            product: one for which `channels` gave groups.
            factors: (groups,) float32, positive.
        """
        ...

    def norm_weight(self, product: Product) -> Tensor | None:
        """Return what the norm that makes the product's input multiplies by, before its bias.

        Returns:
            (groups,) float32, in the order of `channels`, 1 + weight where the norm has it so; None when no norm that
            can take up a scale makes the input.
        """
        ...

    def output_error(self, linears: Sequence[Linear], trial: Callable[[], None]) -> float:
        """Return how much the block's output changes on a few calibration batches when `trial` is applied.

        Args:
            linears: the layers whose weights `trial` changes through `update` or `quantize`; they are put back.
            trial: changes weights.

        Returns:
            Mean squared error of the block's output, over its mean square.
        """
        ...

    @property
    def batches(self) -> int:
        """How many batches the calibration samples make."""
        ...

    def input(self, batch: int) -> Tensor:
        """Return the hidden states that the block is called with on a calibration batch, (rows, tokens, hidden)."""
        ...

    def output(self, batch: int, weights: Mapping[Linear, Tensor] | None = None) -> Tensor:
        """Return the block's output on a calibration batch, with all that was changed so far.

        Args:
            batch: its number.
            weights: weights to compute with instead of the layers' own, each (out_features, in_features) float32;
                gradients flow to them.

        Returns:
            (rows, tokens, hidden) float32.
        """
        ...

    def divergence(self, weights: Mapping[Linear, Tensor], *, later_blocks: bool) -> float:
        """Return how far the model's answers move on calibration samples when the block computes with other weights.

        Args:
            weights: as in `output`.
            later_blocks: run them, as they are at present, loaded one after another; otherwise they are left out, and
                what follows the blocks answers to what this one returns.

        Returns:
            Mean KL divergence in nats a token; for a model without logits the error of its output over its square.
        """
        ...

    def absence(self) -> float:
        """Return how far the model's answers move when the block returns what it is given.

        The later blocks are left out: what follows them answers to this one's output, and to its input.

        Returns:
            Mean KL divergence in nats a token; for a model without logits the error of its output over its square.
        """
        ...

    def stages(self) -> list[Stage]:
        """Return the block's products in the order in which the forward pass reaches them."""
        ...

    def collect(self, stage: Stage, receive: Callable[[Product, Tensor], None]) -> None:
        """Run the calibration samples as far as `stage`, with all that was quantized so far.

        Args:
            stage: one of `stages()`, or products of several.
            receive: called for each sample and product with its input, (tokens, in_features) float32; padding never
                appears in it.

        Raises:
            LlmoptError: an input holds NaN or Inf; it names the layer.
        """
        ...

    def collect_pairs(self, stage: Stage, receive: Callable[[Product, Tensor, Tensor | None], None]) -> None:
        """Run the calibration samples as far as `stage` twice: as `collect` does, and with nothing rounded.

        Only where a pass of the sweep needs `Need.EXACT_INPUTS`.

        Args:
            stage: as in `collect`.
            receive: called for each sample and product with its input, (tokens, in_features) float32, and with that of
                the same tokens when neither this block nor any before it is rounded; None where tokens cannot be told
                apart, since not all of them come to the product: an expert.

        Raises:
            LlmoptError: as in `collect`.
        """
        ...
