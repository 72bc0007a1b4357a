"""One block in memory: the implementation of `core.block.Block`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.activations import QuantizedCache, QuantizedInput
from ..core.block import Linear, Product, Stage
from ..core.quantized import QuantizedWeight
from .block_products import Products
from .handle import TorchModel
from .producers import Part, Producer, linear_candidates, norm_candidates, same
from .replay import Answer, Replay, distance, hidden_of
from .rounding_error import rounding_error
from .skeleton import BlockSite, Skeleton, View
from .store import dequantize_into
from .watch import CacheWatch, Unit

_TRIAL_BATCHES = 2
"""How many calibration batches `output_error` looks at."""

_LOGITS = 1 << 25
"""How many logits `divergence` makes at once, 128 MiB in float32; but no less than those of a row."""


class LoadedBlock:
    """A block whose weights are in memory as float32; without calibration samples as stored, each from its first use.

    Args:
        skeleton: the model.
        site: which block.
        model: gives its weights.
        replay: the calibration samples, None when no pass needs them.
        unrounded: keep weights as they were before they were rounded, in the dtype they are stored in.
        exact: the calibration samples on their way through blocks that are not rounded, None when no pass needs them.

    Attributes:
        results: the quantized layers.
        changed: floating-point checkpoint tensors that are different now.
        sparse: the layers whose zeros stay.
        errors: relative error of each quantized layer; see `rounding_error`.
        factors: what an adapter adds, `down` and `up` by the path of a module.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        site: BlockSite,
        model: TorchModel,
        replay: Replay | None,
        *,
        unrounded: bool = False,
        exact: Replay | None = None,
    ) -> None:
        self._skeleton = skeleton
        self._model = model
        self._site = site
        self._replay = replay
        self._exact = exact
        self._views = {view.linear: view for view in site.views}
        self.dtype = model.facts.dtype
        self.results: dict[Linear, QuantizedWeight] = {}
        self.changed: dict[str, Callable[[], Tensor]] = {}
        self.inputs: dict[str, QuantizedInput] = {}
        self.caches: dict[str, QuantizedCache] = {}
        self.sparse = {linear.name for linear in self._views if linear.name in model.store.sparse}
        self.errors: dict[Linear, float] = {}
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._unrounded: dict[Linear, Tensor] | None = {} if unrounded or exact is not None else None
        self._seen: Products | None = None
        self._producers: dict[Linear, Producer | None] = {}
        self._answers: dict[bool, Answer] = {}

    @property
    def name(self) -> str:
        """The module's path."""
        return self._site.name

    @property
    def linears(self) -> Sequence[Linear]:
        """The linear layers of the block."""
        return tuple(self._views)

    @property
    def transposed(self) -> frozenset[Linear]:
        """The layers that the checkpoint stores as (in, out)."""
        return frozenset(linear for linear, view in self._views.items() if view.transposed)

    def weight(self, linear: Linear) -> Tensor:
        """Return the current weight, (out_features, in_features) float32; not to be written to."""
        return self._held(linear).float()

    def rows(self, linear: Linear, count: int) -> Iterator[Tensor]:
        """Yield the current weight a few rows at a time, in the dtype it is held in; see `core.block.Block`."""
        name = self._only_on_disk(linear)
        if name is None:
            yield from self._held(linear).split(count)
        else:
            yield from self._model.rows(name, count)

    def _only_on_disk(self, linear: Linear) -> str | None:
        """Return the checkpoint's matrix that holds a weight as it is; None where it is in memory or is none."""
        view = self._views[linear]
        name = self._skeleton.checkpoint_name(view.parameter)
        loaded = linear in self.results or not self._skeleton.parameter(view.parameter).is_meta
        return None if loaded or view.rows is not None or view.transposed else name

    def _strips(self, linear: Linear, strips: Sequence[slice]) -> Iterator[Tensor]:
        name = self._only_on_disk(linear)
        if name is not None:
            return self._model.strips(name, strips)
        held = self._held(linear)
        return (held[strip] for strip in strips)

    def _held(self, linear: Linear) -> Tensor:
        """Return the current weight in the dtype it is held in."""
        if self._replay is None and linear in self.results:
            return self.results[linear].dequantize()
        return self._view(self._views[linear])

    def quantize(self, linear: Linear, weight: QuantizedWeight) -> None:
        """Make `weight` the layer's weight."""
        self.errors[linear] = rounding_error(weight, partial(self._strips, linear))
        if self._unrounded is not None and linear not in self.results:
            self._unrounded[linear] = self._held(linear).to(getattr(torch, self.dtype), copy=True)
        self.results[linear] = weight
        if self._replay is None:
            self._release(linear)
        else:
            dequantize_into(self._view(self._views[linear]), weight)
        self.changed.pop(f"{linear.name}.weight", None)

    def unrounded(self, linear: Linear) -> Tensor:
        """Return the weight of a quantized layer as it was just before; see `core.block.Block`."""
        assert self._unrounded is not None, "a pass of the sweep needs it"
        return self._unrounded[linear].float()

    @contextmanager
    def computing_unrounded(self) -> Iterator[None]:
        """Have the block compute with the weights, inputs and caches that it had before they were rounded."""
        assert self._unrounded is not None, "a pass of the sweep needs it"
        skeleton, kept = self._skeleton, (self._skeleton.inputs, self._skeleton.caches)
        skeleton.inputs, skeleton.caches = {}, {}
        for linear, weight in self._unrounded.items():
            self._view(self._views[linear]).copy_(weight)
        try:
            yield
        finally:
            skeleton.inputs, skeleton.caches = kept
            for linear in self._unrounded:
                dequantize_into(self._view(self._views[linear]), self.results[linear])

    def adaptable(self, linear: Linear) -> str | None:
        """Return the path of the linear module that the layer is; see `core.block.Block`."""
        view = self._views[linear]
        path = view.parameter.removesuffix(".weight")
        if view.rows is not None or path == view.parameter:
            return None
        return path if isinstance(self._skeleton.model.get_submodule(path), nn.Linear | Conv1D) else None

    def adapt(self, linear: Linear, down: Tensor, up: Tensor) -> None:
        """Add an adapter to a layer; see `core.block.Block`."""
        path = self.adaptable(linear)
        assert path is not None, "asked for before"
        self.factors[path] = down, up
        if self._replay is not None:
            self._view(self._views[linear]).add_(up @ down)

    def quantize_input(self, linear: Linear, rounding: QuantizedInput) -> None:
        """Round the layer's input from now on."""
        self.inputs[linear.name] = self._skeleton.inputs[linear.name] = rounding

    @property
    def attention(self) -> str | None:
        """Path of the module that keeps keys and values."""
        return self._site.attention

    def quantize_cache(self, rounding: QuantizedCache) -> None:
        """Round keys and values from now on."""
        assert self.attention is not None, "asked for before"
        self.caches[self.attention] = self._skeleton.caches[self.attention] = rounding

    def collect_cache(self, receive: Callable[[Tensor, Tensor], None]) -> None:
        """Look at keys and values; see `core.block.Block`."""
        for index in range(len(self._samples)):
            args, kwargs = self._samples.call(self._site, index)
            with torch.no_grad(), CacheWatch(receive):
                self._site.module(*args, **kwargs)

    def update(self, linear: Linear, weight: Tensor) -> None:
        """Replace the layer's weight by another in floating point, rounded to the dtype it is stored in."""
        self._view(self._views[linear]).copy_(self._rounded(weight))
        self.results.pop(linear, None)
        self.changed[f"{linear.name}.weight"] = lambda: self._stored(linear)

    def sparsify(self, linear: Linear, weight: Tensor) -> None:
        """Replace the layer's weight by one whose zeros stay."""
        self.update(linear, weight)
        self.sparse.add(linear.name)

    def mask(self, linear: Linear) -> Tensor | None:
        """Return where a sparse layer's weight is not zero; see `core.block.Block`."""
        return self._held(linear) != 0 if linear.name in self.sparse else None

    def channels(self, product: Product) -> Tensor | None:
        """Return the groups of input channels; see `core.block.Block`."""
        producer = self._producer(product)
        return None if producer is None else producer.channels

    def balance(self, product: Product, factors: Tensor) -> None:
        """Move a scale from the input of `product` into its weights; see `core.block.Block`."""
        producer = self._producer(product)
        assert producer is not None, "asked for with channels()"
        self._balance(product, producer, factors)
        for part in producer.parts:
            part.tensor.copy_(self._rounded(part.tensor))
            self.changed[part.name] = lambda part=part: self._part_stored(part)
        for linear in product.linears:
            self.update(linear, self.weight(linear))

    def norm_weight(self, product: Product) -> Tensor | None:
        """Return the weight of the norm that makes the product's input; see `core.block.Block`."""
        producer = self._producer(product)
        return None if producer is None else producer.norm_weight()

    def output_error(self, linears: Sequence[Linear], trial: Callable[[], None]) -> float:
        """Return how much `trial` changes the block's output; see `core.block.Block`."""
        before = {linear: self.weight(linear).clone() for linear in linears}
        results, changed = dict(self.results), dict(self.changed)
        indices = range(min(len(self._samples), _TRIAL_BATCHES))
        expected = [self._output(index) for index in indices]
        try:
            trial()
            error = sum(float((self._output(index) - expected[index]).square().mean()) for index in indices)
        finally:
            for linear, weight in before.items():
                self._view(self._views[linear]).copy_(weight)
            self.results, self.changed = results, changed
        return error / max(sum(float(one.square().mean()) for one in expected), 1e-30)

    @property
    def batches(self) -> int:
        """How many batches the calibration samples make."""
        return len(self._samples)

    def input(self, batch: int) -> Tensor:
        """Return the hidden states that the block is called with; see `core.block.Block`."""
        return hidden_of(self._samples.call(self._site, batch))

    def output(self, batch: int, weights: Mapping[Linear, Tensor] | None = None) -> Tensor:
        """Return the block's output on a calibration batch; see `core.block.Block`."""
        if weights is None:
            return self._output(batch)
        made = self._changed_output(batch, weights)
        return made if isinstance(made, Tensor) else made[0]

    def divergence(self, weights: Mapping[Linear, Tensor], *, later_blocks: bool) -> float:
        """Return how far the model's answers move with other weights here; see `core.block.Block`."""
        if later_blocks not in self._answers:
            self._answers[later_blocks] = self._answer({}, later_blocks)
        return distance(self._answers[later_blocks], self._answer(weights, later_blocks))

    def absence(self) -> float:
        """Return how far the model's answers move without the block; see `core.block.Block`."""
        tokens = self._tokens_answered()
        call = self._samples.call(self._site, 0, tokens=tokens)
        with torch.no_grad():
            made = self._site.module(*call[0], **call[1])
        given = hidden_of(call)
        skipped = given if isinstance(made, Tensor) else (given, *made[1:])
        expected, got = (
            self._samples.answer(self._site, 0, one, self._model.read, later_blocks=False, tokens=tokens)
            for one in (made, skipped)
        )
        return distance(expected, got)

    def _tokens_answered(self) -> int:
        """Return of how many tokens the logits may be made at once."""
        return max(1, _LOGITS // getattr(self._skeleton.config.get_text_config(), "vocab_size", 1))

    def _answer(self, weights: Mapping[Linear, Tensor], later_blocks: bool) -> Answer:
        tokens = self._tokens_answered()
        with torch.no_grad():
            made = self._changed_output(0, weights, tokens=tokens)
        return self._samples.answer(self._site, 0, made, self._model.read, later_blocks=later_blocks, tokens=tokens)

    def _changed_output(self, batch: int, weights: Mapping[Linear, Tensor], *, tokens: int | None = None) -> Any:
        args, kwargs = self._samples.call(self._site, batch, tokens=tokens)
        return torch.func.functional_call(self._site.module, self._with(weights), args, kwargs)

    def _with(self, weights: Mapping[Linear, Tensor]) -> dict[str, Tensor]:
        """Return the module's parameters, by their names in it, that hold `weights` in the place of the layers' own."""
        parameters: dict[str, Tensor] = {}
        for linear, weight in weights.items():
            view = self._views[linear]
            name = view.parameter.removeprefix(f"{self._site.name}.")
            if name not in parameters:
                parameters[name] = self._skeleton.parameter(view.parameter).data.clone()
            view.of(parameters[name]).copy_(weight)
        return parameters

    def stages(self) -> list[Stage]:
        """Return the block's products in the order in which the forward pass reaches them."""
        return self._products.stages()

    def collect(self, stage: Stage, receive: Callable[[Product, Tensor], None]) -> None:
        """Run the calibration samples as far as `stage`; see `core.block.Block`."""
        self._products.collect(stage, receive)

    def collect_pairs(self, stage: Stage, receive: Callable[[Product, Tensor, Tensor | None], None]) -> None:
        """Run the calibration samples as far as `stage` twice; see `core.block.Block`."""
        assert self._exact is not None, "a pass of the sweep needs it"
        self._products.collect_pairs(stage, receive, self._exact, self.computing_unrounded)

    @property
    def expert_tokens(self) -> dict[Unit, int]:
        """How many calibration tokens came to each expert."""
        return {} if self._seen is None else self._seen.expert_tokens

    @property
    def _products(self) -> Products:
        if self._seen is None:
            self._seen = Products(self._skeleton, self._site, self._samples)
        return self._seen

    def _producer(self, product: Product) -> Producer | None:
        """Return what makes the product's input, found once by trial."""
        key = product.linears[0]
        if key not in self._producers:
            self._producers[key] = next((one for one in self._candidates(product) if self._holds(product, one)), None)
        return self._producers[key]

    def _candidates(self, product: Product) -> list[Producer]:
        norms = self._products.norms(product)
        return [*norm_candidates(norms, self._skeleton.checkpoint_name), *self.earlier_rows(product)]

    def earlier_rows(self, product: Product) -> list[Producer]:
        """Return the rows of earlier layers that may make the product's input, the nearest first."""
        return linear_candidates(product, self._products.earlier(product), self._rows, self.head_size(product))

    def head_size(self, product: Product) -> int | None:
        """Return the channels of an attention head, if heads make the product's input; None when the model has none."""
        config = self._skeleton.config.get_text_config()
        size, heads = getattr(config, "head_dim", None), getattr(config, "num_attention_heads", None)
        if size is not None:
            return size
        return product.in_features // heads if heads and product.in_features % heads == 0 else None

    def _holds(self, product: Product, producer: Producer) -> bool:
        """Return whether the block computes the same when the producer and the product are balanced at random.

        And another thing when only the product is scaled: an expert that no token of the batch comes to proves nothing.
        """
        generator = torch.Generator().manual_seed(0)
        factors = torch.rand(producer.width, generator=generator) + 0.5
        kept = [(part.tensor, part.tensor.clone()) for part in producer.parts]
        kept += [(view, view.clone()) for view in (self._view(self._views[linear]) for linear in product.linears)]
        expected = self._output(0, whole=True)
        self._balance(product, producer, factors)
        holds = same(expected, self._output(0, whole=True))
        if holds:
            for part in producer.parts:
                part.divide(1 / factors)
            holds = not same(expected, self._output(0, whole=True))
        for tensor, before in kept:
            tensor.copy_(before)
        return holds

    def _balance(self, product: Product, producer: Producer, factors: Tensor) -> None:
        for part in producer.parts:
            part.divide(factors)
        for linear in product.linears:
            self._view(self._views[linear]).mul_(factors[producer.channels])

    def _rows(self, linear: Linear, rows: slice) -> tuple[Part, ...]:
        """Return rows of a layer's weight, and of its bias where it has one."""
        view = self._views[linear]
        parts = [Part(f"{linear.name}.weight", self._view(view)[rows])]
        bias = f"{view.parameter.removesuffix('.weight')}.bias"
        name = self._skeleton.checkpoint_name(bias)
        if name is not None and view.rows is None:
            parts.append(Part(name, self._skeleton.parameter(bias).data[rows]))
        return tuple(parts)

    def _output(self, index: int, *, whole: bool = False) -> Any:
        args, kwargs = self._samples.call(self._site, index)
        with torch.no_grad():
            made = self._site.module(*args, **kwargs)
        return made if whole or isinstance(made, Tensor) else made[0]

    def _rounded(self, weight: Tensor) -> Tensor:
        return weight.to(getattr(torch, self.dtype)).float()

    def _stored(self, linear: Linear) -> Tensor:
        weight = self.weight(linear)
        stored = weight.T if self._views[linear].transposed else weight
        return stored.to(getattr(torch, self.dtype)).contiguous()

    def _part_stored(self, part: Part) -> Tensor:
        """Return the whole checkpoint tensor that a part is of."""
        for linear, view in self._views.items():
            if part.name == f"{linear.name}.weight":
                return self._stored(linear)
            if part.name.endswith(".bias") and part.name.removesuffix(".bias") == linear.name:
                bias = self._skeleton.parameter(f"{view.parameter.removesuffix('.weight')}.bias")
                return bias.data.to(getattr(torch, self.dtype)).contiguous()
        return part.tensor.to(getattr(torch, self.dtype)).contiguous()

    @property
    def _samples(self) -> Replay:
        assert self._replay is not None, "the plan gives calibration data to every pass that needs it"
        return self._replay

    def _view(self, view: View) -> Tensor:
        if self._skeleton.parameter(view.parameter).is_meta:
            self._skeleton.load([view.parameter], self._model.read, widen=self._replay is not None)
        return view.of(self._skeleton.parameter(view.parameter).data)

    def _release(self, linear: Linear) -> None:
        """Free the layer's parameter, if it is in memory, when all layers in it are quantized."""
        name = self._views[linear].parameter
        others = (other for other, view in self._views.items() if view.parameter == name)
        if not self._skeleton.parameter(name).is_meta and all(other in self.results for other in others):
            self._skeleton.unload([name])


@contextmanager
def loaded(
    skeleton: Skeleton,
    site: BlockSite,
    model: TorchModel,
    replay: Replay | None,
    *,
    unrounded: bool = False,
    exact: Replay | None = None,
) -> Iterator[LoadedBlock]:
    """Have one block's weights in memory: all at once when samples will run through it, else as they are used."""
    if replay is not None:
        skeleton.load(site.parameters, model.read)
    try:
        yield LoadedBlock(skeleton, site, model, replay, unrounded=unrounded, exact=exact)
    finally:
        skeleton.unload(site.parameters)
