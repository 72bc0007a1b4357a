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

    from .adapter import Adapter
    from .quantized import Grid, QuantizedWeight


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
