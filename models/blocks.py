"""One block in memory: the implementation of `core.model.Block`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.activations import QuantizedCache, QuantizedInput
from ..core.errors import LlmoptError
from ..core.model import Linear, Product, Stage
from ..core.quantized import QuantizedWeight
from .handle import TorchModel
from .producers import Part, Producer, linear_candidates, norm_candidates, same
from .replay import Answer, Replay, distance, hidden_of
from .rounding_error import rounding_error
from .skeleton import BlockSite, Skeleton, View
from .store import dequantize_into
from .watch import CacheWatch, NormCall, Sighting, Unit, Watch, norm_calls, same_input

_LOOK_TOKENS = 256
"""How many tokens are enough to see in what order the layers of a block are reached."""

_TRIAL_BATCHES = 2
"""How many calibration batches `output_error` looks at."""

_LOGITS = 1 << 25
"""How many logits `divergence` makes at once, 128 MiB in float32; but no less than those of a row."""


class _Enough(Exception):  # noqa: N818  (control flow, no error)
    """Every product of the stage was seen."""


class LoadedBlock:
    """A block whose weights are in memory as float32; without calibration samples as stored, each from its first use.

    Args:
        skeleton: the model.
        site: which block.
        model: gives its weights.
        replay: the calibration samples, None when no pass needs them.
        unrounded: keep weights as they were before they were rounded, in the dtype they are stored in.

    Attributes:
        results: the quantized layers.
        changed: floating-point checkpoint tensors that are different now.
        sparse: the layers whose zeros stay.
        errors: relative error of each quantized layer; see `rounding_error`.
        expert_tokens: how many calibration tokens came to each expert.
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
    ) -> None:
        self._skeleton = skeleton
        self._model = model
        self._site = site
        self._replay = replay
        self._views = {view.linear: view for view in site.views}
        self._once: dict[Unit, bool] = {}
        self.dtype = model.facts.dtype
        self.results: dict[Linear, QuantizedWeight] = {}
        self.changed: dict[str, Callable[[], Tensor]] = {}
        self.inputs: dict[str, QuantizedInput] = {}
        self.caches: dict[str, QuantizedCache] = {}
        self.sparse = {linear.name for linear in self._views if linear.name in model.store.sparse}
        self.errors: dict[Linear, float] = {}
        self.expert_tokens: dict[Unit, int] = {}
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._unrounded: dict[Linear, Tensor] | None = {} if unrounded else None
        self._order_seen: list[Stage] | None = None
        self._norms: dict[Unit, list[tuple[str, nn.Module]]] = {}
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
        """Yield the current weight a few rows at a time, in the dtype it is held in; see `core.model.Block`."""
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
        """Return the weight of a quantized layer as it was just before; see `core.model.Block`."""
        assert self._unrounded is not None, "a pass of the sweep needs it"
        return self._unrounded[linear].float()

    def adaptable(self, linear: Linear) -> str | None:
        """Return the path of the linear module that the layer is; see `core.model.Block`."""
        view = self._views[linear]
        path = view.parameter.removesuffix(".weight")
        if view.rows is not None or path == view.parameter:
            return None
        return path if isinstance(self._skeleton.model.get_submodule(path), nn.Linear | Conv1D) else None

    def adapt(self, linear: Linear, down: Tensor, up: Tensor) -> None:
        """Add an adapter to a layer; see `core.model.Block`."""
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
        """Look at keys and values; see `core.model.Block`."""
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
        """Return where a sparse layer's weight is not zero; see `core.model.Block`."""
        return self._held(linear) != 0 if linear.name in self.sparse else None

    def channels(self, product: Product) -> Tensor | None:
        """Return the groups of input channels; see `core.model.Block`."""
        producer = self._producer(product)
        return None if producer is None else producer.channels

    def balance(self, product: Product, factors: Tensor) -> None:
        """Move a scale from the input of `product` into its weights; see `core.model.Block`."""
        producer = self._producer(product)
        assert producer is not None, "asked for with channels()"
        self._balance(product, producer, factors)
        for part in producer.parts:
            part.tensor.copy_(self._rounded(part.tensor))
            self.changed[part.name] = lambda part=part: self._part_stored(part)
        for linear in product.linears:
            self.update(linear, self.weight(linear))

    def norm_weight(self, product: Product) -> Tensor | None:
        """Return the weight of the norm that makes the product's input; see `core.model.Block`."""
        producer = self._producer(product)
        return None if producer is None else producer.norm_weight()

    def output_error(self, linears: Sequence[Linear], trial: Callable[[], None]) -> float:
        """Return how much `trial` changes the block's output; see `core.model.Block`."""
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
        """Return the hidden states that the block is called with; see `core.model.Block`."""
        return hidden_of(self._samples.call(self._site, batch))

    def output(self, batch: int, weights: Mapping[Linear, Tensor] | None = None) -> Tensor:
        """Return the block's output on a calibration batch; see `core.model.Block`."""
        if weights is None:
            return self._output(batch)
        made = self._changed_output(batch, weights)
        return made if isinstance(made, Tensor) else made[0]

    def divergence(self, weights: Mapping[Linear, Tensor], *, later_blocks: bool) -> float:
        """Return how far the model's answers move with other weights here; see `core.model.Block`."""
        if later_blocks not in self._answers:
            self._answers[later_blocks] = self._answer({}, later_blocks)
        return distance(self._answers[later_blocks], self._answer(weights, later_blocks))

    def absence(self) -> float:
        """Return how far the model's answers move without the block; see `core.model.Block`."""
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
        if self._order_seen is None:
            norms: list[NormCall] = []
            with norm_calls(self._modules(), norms.append):
                seen = self._look()
            self._once = {unit: sighting.times == 1 for unit, sighting in seen.items()}
            self._order_seen = list(self._order(seen))
            self._norms = {
                self._unit(product.linears[0]): [
                    (call.path, call.module) for call in norms if same_input(call.output, read)
                ]
                for stage in self._order_seen
                for product in stage
                for unit in [self._unit(product.linears[0])]
                if unit in seen
                for read in [seen[unit].input]
            }
        return self._order_seen

    def _look(self) -> dict[Unit, Sighting]:
        """Run a few tokens through the block, and whole batches only while a layer has not been seen."""
        addresses = self._addresses()
        seen: dict[Unit, Sighting] = {}
        for index, tokens in [(0, _LOOK_TOKENS), *((index, None) for index in range(len(self._samples)))]:
            run: dict[Unit, Sighting] = {}
            self._run(index, addresses, partial(_sight, run), tokens=tokens)
            _add_sightings(seen, run)
            if {name for name, _ in seen} == {name for name, _ in addresses.values()}:
                break
        return seen

    def collect(self, stage: Stage, receive: Callable[[Product, Tensor], None]) -> None:
        """Run the calibration samples as far as `stage`; see `core.model.Block`."""
        units = {self._unit(product.linears[0]): product for product in stage}
        addresses = {address: unit for address, unit in self._addresses().items() if unit in units}
        single = all(unit[1] is None and self._once.get(unit, False) for unit in units)
        tokens = dict.fromkeys(units, 0)
        for index in range(len(self._samples)):
            missing = set(units)

            def see(unit: Unit, tensor: Tensor, missing: set[Unit] = missing) -> None:
                product = units[unit]
                rows = tensor.reshape(-1, product.in_features)
                # A sum that is finite proves it without a copy; one that overflows falls to the test.
                if not (bool(torch.isfinite(rows.sum())) or bool(torch.isfinite(rows).all())):
                    raise LlmoptError(
                        f"the input of `{product.linears[0].name}` holds NaN or Inf",
                        where=f"calibration batch {index + 1} of {len(self._samples)}",  # noqa: B023
                        hint="the model overflows on this text: check its weights",
                    )
                tokens[unit] += len(rows)
                receive(product, rows)
                missing.discard(unit)
                if single and not missing:
                    raise _Enough

            self._run(index, addresses, see)
        self.expert_tokens.update({unit: seen for unit, seen in tokens.items() if unit[1] is not None})

    def _producer(self, product: Product) -> Producer | None:
        """Return what makes the product's input, found once by trial."""
        key = product.linears[0]
        if key not in self._producers:
            self._producers[key] = next((one for one in self._candidates(product) if self._holds(product, one)), None)
        return self._producers[key]

    def _candidates(self, product: Product) -> list[Producer]:
        norms = self._norms.get(self._unit(product.linears[0]), [])
        return [*norm_candidates(norms, self._skeleton.checkpoint_name), *self.earlier_rows(product)]

    def earlier_rows(self, product: Product) -> list[Producer]:
        """Return the rows of earlier layers that may make the product's input, the nearest first."""
        stages = self.stages()
        at = next(index for index, stage in enumerate(stages) for one in stage if product.linears[0] in one.linears)
        earlier = [linear for stage in reversed(stages[:at]) for one in stage for linear in reversed(one.linears)]
        expert = self._unit(product.linears[0])[1]
        earlier = [linear for linear in earlier if expert is None or self._unit(linear)[1] == expert]
        return linear_candidates(product, earlier, self._rows, self.head_size(product))

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

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        for path, module in self._site.module.named_modules():
            yield f"{self._site.name}.{path}", module

    @property
    def _samples(self) -> Replay:
        assert self._replay is not None, "the plan gives calibration data to every pass that needs it"
        return self._replay

    def _run(
        self,
        index: int,
        addresses: dict[int, Unit],
        receive: Callable[[Unit, Tensor], None],
        *,
        tokens: int | None = None,
    ) -> None:
        args, kwargs = self._samples.call(self._site, index, tokens=tokens)
        with torch.no_grad(), Watch(addresses, receive):
            try:
                self._site.module(*args, **kwargs)
            except _Enough:
                return

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

    def _unit(self, linear: Linear) -> Unit:
        view = self._views[linear]
        return view.parameter, view.rows.expert if view.rows is not None else None

    def _addresses(self) -> dict[int, Unit]:
        addresses: dict[int, Unit] = {}
        for linear, view in self._views.items():
            parameter = self._skeleton.parameter(view.parameter).data
            addresses[view.address(parameter)] = self._unit(linear)
        return addresses

    def _members(self, unit: Unit) -> tuple[Linear, ...]:
        return tuple(linear for linear in self._views if self._unit(linear) == unit)

    def _order(self, seen: dict[Unit, Sighting]) -> Iterator[Stage]:
        """Yield a stage for each distinct input; all experts of a parameter share one, each with its own product."""
        done: set[Unit] = set()
        for unit, sighting in seen.items():
            if unit in done:
                continue
            if unit[1] is None:
                group = [other for other in seen if other[1] is None and same_input(seen[other].input, sighting.input)]
                done.update(group)
                yield (Product(tuple(linear for other in group for linear in self._members(other))),)
            else:
                experts = dict.fromkeys(self._unit(linear) for linear in self._views)
                group = [other for other in experts if other[0] == unit[0]]
                done.update(group)
                yield tuple(Product(self._members(other)) for other in group)


def _sight(seen: dict[Unit, Sighting], unit: Unit, tensor: Tensor) -> None:
    if unit in seen:
        seen[unit].times += 1
    else:
        seen[unit] = Sighting(tensor)


def _add_sightings(seen: dict[Unit, Sighting], run: dict[Unit, Sighting]) -> None:
    """Add what a further run has shown: new units, and how often one run meets a unit at most."""
    for unit, sighting in run.items():
        known = seen.setdefault(unit, sighting)
        known.times = max(known.times, sighting.times)


@contextmanager
def loaded(
    skeleton: Skeleton, site: BlockSite, model: TorchModel, replay: Replay | None, *, unrounded: bool = False
) -> Iterator[LoadedBlock]:
    """Have one block's weights in memory: all at once when samples will run through it, else as they are used."""
    if replay is not None:
        skeleton.load(site.parameters, model.read)
    try:
        yield LoadedBlock(skeleton, site, model, replay, unrounded=unrounded)
    finally:
        skeleton.unload(site.parameters)
