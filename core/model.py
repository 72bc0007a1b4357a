"""What a pass may ask of a model. `models/` implements it; passes know nothing more."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .facts import ModelFacts
from .progress import Reporter

if TYPE_CHECKING:
    from torch import Tensor

    from .activations import QuantizedCache, QuantizedInput
    from .adapter import Adapter
    from .quantized import Grid, QuantizedWeight


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


class Rotation(Protocol):
    """An orthogonal matrix Q."""

    @property
    def width(self) -> int:
        """Number of channels it mixes."""
        ...

    def turn(self, rows: Tensor) -> Tensor:
        """Return `rows @ Q`, (…, width) float64."""
        ...


@dataclass(frozen=True, slots=True)
class RotationReport:
    """What `ModelHandle.rotate` did.

    Attributes:
        changed: the checkpoint tensors that are different now.
        skipped: (name, reason) of what could not be rotated.
        folded: norms whose weights were multiplied into the layers that follow.
        paired: layers whose input is rotated head by head, along with the layer that makes it.
        block_difference: largest difference of a block's update from the rotated one, over the largest update.
        logit_difference: largest difference of a log probability from before, over the largest; None when the
            residual stream was left alone.
        untied: the tensor that tied embeddings now have beside them, None when nothing was untied.
    """

    changed: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    folded: int
    paired: int
    block_difference: float
    logit_difference: float | None
    untied: str | None


WidthKind = Literal["mlp", "heads", "hidden", "vocabulary"]
"""What a model may lose some of: neurons of its MLPs, heads of keys and values with their queries, channels of the
residual stream, tokens."""


@dataclass(frozen=True, slots=True)
class ChannelSet:
    """Units of which some may be taken away: the neurons of one MLP, the heads of one attention, or the whole stream.

    Attributes:
        name: tells it from others.
        kind: what the units are.
        size: the setting in config.json; sets of the same size must keep as many units.
        units: how many there are.
        readers: linear layers whose inputs they are; for each the input channels of a unit in each part of its input.
            The parts lie one after another, and in each of them the units.
    """

    name: str
    kind: WidthKind
    size: str
    units: int
    readers: Mapping[str, tuple[int, ...]]


class Channels(Protocol):
    """The units that a model may lose, and how they lie in its weights."""

    @property
    def sets(self) -> Sequence[ChannelSet]:
        """What units are chosen from."""
        ...

    def kept(self, model: Any, choice: Mapping[str, Sequence[int]]) -> Any:
        """Return the model with no other units than those chosen.

        Args:
            model: the model that was asked for them, whose weights may have changed since.
            choice: the units that stay, by set; sets that are not named stay whole, together with all of their size.
        """
        ...


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

        Only where a pass of the sweep needs `Need.UNROUNDED`.
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


class ModelHandle(Protocol):
    """A model on its way through the passes. Weights stay on disk until they are asked for."""

    @property
    def facts(self) -> ModelFacts:
        """The outline, as the passes so far have left it."""
        ...

    @property
    def quantized(self) -> Mapping[str, Grid]:
        """The quantized layers by checkpoint name (without `.weight`), and the grid of each."""
        ...

    @property
    def adapter(self) -> Adapter | None:
        """What layers add to their outputs, kept beside the weights; None where there is no such thing."""
        ...

    def adapter_tensors(self) -> Mapping[str, Tensor]:
        """Read the adapter's tensors from disk, under PEFT's names; none where there is no adapter."""
        ...

    def cast(self, dtype: str) -> ModelHandle:
        """Return the model with all floating-point weights stored in `dtype`."""
        ...

    def rotate(
        self,
        residual: Callable[[int], Rotation] | None,
        values: Callable[[int], Rotation] | None,
        *,
        seed: int,
        reporter: Reporter,
    ) -> tuple[ModelHandle, RotationReport]:
        """Return the model computing the same in rotated channels, every block proven to.

        Args:
            residual: makes the rotation of the residual stream from its width; norms are folded into what reads them.
                None leaves the stream as it is.
            values: makes the rotation of each head's values from the head size. None leaves them as they are.
            seed: of the token ids that the proof is made with.
            reporter: shown progress.

        Raises:
            UsageError: the residual stream of this architecture cannot be rotated; it says what stands in the way.
        """
        ...

    def blocks(self) -> Sequence[Sequence[str]]:
        """Return the repeated blocks of every stack, by `Block.name`: an encoder's before its decoder's."""
        ...

    def without_blocks(self, dropped: Collection[str], *, seed: int) -> ModelHandle:
        """Return the model without some of its blocks, proven to answer as this one does with them left out.

        Args:
            dropped: names of blocks.
            seed: of the token ids that the proof is made with.

        Raises:
            UsageError: nothing would be left of a stack, or a block would be of another kind in its new place.
        """
        ...

    def channels(
        self, kinds: Sequence[WidthKind], *, seed: int, keep: Callable[[WidthKind, int], int] | None = None
    ) -> Channels:
        """Return the units of some kinds that the model may lose, proven to be what they seem.

        Args:
            kinds: which.
            seed: of the token ids that the proof is made with.
            keep: gives how many units of a kind, of so many, will stay; config.json must be able to hold that number.

        Raises:
            UsageError: a kind cannot be pruned in this architecture; it says what stands in the way.
        """
        ...

    @property
    def folder(self) -> Path:
        """Where the files beside the weights lie: tokenizer, generation settings."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """How many tokens the embeddings have."""
        ...

    def with_vocabulary(
        self, kept: Sequence[int], config: Mapping[str, Any], *, side_files: Callable[[Path], None], seed: int
    ) -> ModelHandle:
        """Return the model with fewer tokens, proven to answer as before for those that are left.

        Args:
            kept: the ids of the tokens that stay, in the order of their new ids.
            config: what changes in config.json beside the number of tokens.
            side_files: as for `rewritten`.
            seed: of the token ids that the proof is made with.

        Raises:
            UsageError: the vocabulary of this architecture cannot be pruned; it says what stands in the way.
        """
        ...

    def loss_without(self, dropped: Collection[str], rows: Sequence[Sequence[int]], *, tokens: int = 2048) -> float:
        """Return how well a language model predicts text while some of its blocks are left out.

        Args:
            dropped: names of blocks.
            rows: token ids.
            tokens: that run through a block at a time.

        Returns:
            Mean negative log-likelihood in nats a token.
        """
        ...

    def read(self, name: str) -> Tensor:
        """Return a checkpoint tensor as the passes left it, quantized layers dequantized."""
        ...

    def tensor_specs(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of every checkpoint tensor as it will be stored in floating point."""
        ...

    def rewritten(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        config: Mapping[str, Any],
        *,
        side_files: Callable[[Path], None] | None = None,
    ) -> ModelHandle:
        """Return a model of another shape: other tensors, another config.json.

        It is written to the work folder while `tensors` is gone through, and what follows starts from it as from any
        checkpoint; what earlier passes changed is in it if it was read through `read`.

        Args:
            tensors: every tensor of the new checkpoint by name, in the dtype in which it is stored. They are read one
                at a time, so let them be made as they are asked for.
            config: what changes in config.json.
            side_files: changes tokenizer and other side files in the new folder, where they were copied to.
        """
        ...

    def materialize(self, dtype: str = "float32") -> Any:
        """Return the whole model in memory as a transformers model in eval mode, no parameter asking for gradients."""
        ...

    def quantized_parameters(self) -> Mapping[str, str]:
        """Return the quantized layers by the parameter of `materialize()` that each of them is.

        Raises:
            UsageError: a quantized layer is only a part of a parameter.
        """
        ...

    def quantized_weight(self, name: str) -> QuantizedWeight:
        """Return a quantized layer."""
        ...

    @property
    def sparse(self) -> Collection[str]:
        """The layers by checkpoint name whose zeros must stay zeros."""
        ...

    def sparse_parameters(self) -> Sequence[str]:
        """Return the parameters of `materialize()` that hold a sparse layer, or a part of one."""
        ...

    def stored_transposed(self, name: str) -> bool:
        """Return whether the checkpoint, and the parameter, hold quantized layer `name` as (in, out)."""
        ...

    def with_parameters(
        self, read: Callable[[str], Tensor | None], *, quantized: Callable[[str], QuantizedWeight] | None = None
    ) -> ModelHandle:
        """Return the model with other values in its parameters, written to disk as by `rewritten`.

        Args:
            quantized: gives the new weight of a quantized layer by its name; needed where there are such layers.
            read: gives the value of a parameter of `materialize()` by its name, None for one that stays as it is;
                rounded to the dtype in which the checkpoint stores it. Asked for one at a time.

        Raises:
            LlmoptError: a parameter is made of several checkpoint tensors in a way that cannot be undone, or a value
                does not fit into its dtype.
        """
        ...

    def with_adapter(self, factors: Mapping[str, tuple[Tensor, Tensor]], *, alpha: int) -> ModelHandle:
        """Return the model with a LoRA adapter beside its weights, which stay as they are.

        Args:
            factors: `down`, (rank, in_features), and `up`, (out_features, rank), float32, by the path of a module of
                `materialize()`; all of one rank.
            alpha: the scale of the adapter times its rank.

        Raises:
            UsageError: a module is no linear layer.
        """
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        """Yield every weight once, under its checkpoint name (a quantized one without `.weight`), block by block."""
        ...
