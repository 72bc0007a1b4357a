"""The products of a block: in what order the forward pass reaches them, and what they read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from ..core.block import Linear, Product, Stage
from ..core.errors import LlmoptError
from .replay import Replay, hidden_of
from .skeleton import BlockSite, Skeleton
from .watch import NormCall, Sighting, Unit, Watch, norm_calls, same_input

_LOOK_TOKENS = 256
"""How many tokens are enough to see in what order the layers of a block are reached."""


class _Enough(Exception):  # noqa: N818  (control flow, no error)
    """Every product of the stage was seen."""


class Products:
    """The products of one block, seen while calibration samples run through it.

    Args:
        skeleton: the model, the block's weights in memory.
        site: which block.
        samples: the calibration samples.

    Attributes:
        expert_tokens: how many calibration tokens came to each expert.
    """

    def __init__(self, skeleton: Skeleton, site: BlockSite, samples: Replay) -> None:
        self._skeleton, self._site, self._samples = skeleton, site, samples
        self._views = {view.linear: view for view in site.views}
        self._once: dict[Unit, bool] = {}
        self._norms: dict[Unit, list[tuple[str, nn.Module]]] = {}
        self._stages: list[Stage] | None = None
        self.expert_tokens: dict[Unit, int] = {}

    def stages(self) -> list[Stage]:
        """Return the block's products in the order in which the forward pass reaches them."""
        if self._stages is None:
            norms: list[NormCall] = []
            with norm_calls(self._modules(), norms.append):
                seen = self._look()
            self._once = {unit: sighting.times == 1 for unit, sighting in seen.items()}
            self._stages = list(self._order(seen))
            self._norms = {
                self.unit(product.linears[0]): [
                    (call.path, call.module) for call in norms if same_input(call.output, read)
                ]
                for stage in self._stages
                for product in stage
                for unit in [self.unit(product.linears[0])]
                if unit in seen
                for read in [seen[unit].input]
            }
        return self._stages

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
        tokens: Counter[Unit] = Counter()

        def count(product: Product, rows: Tensor) -> None:
            tokens[self.unit(product.linears[0])] += len(rows)
            receive(product, rows)

        for index in range(len(self._samples)):
            self._reach(stage, index, self._samples, count)
        self._note_experts(stage, tokens)

    def collect_pairs(
        self,
        stage: Stage,
        receive: Callable[[Product, Tensor, Tensor | None], None],
        exact: Replay,
        unrounded: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Run the calibration samples as far as `stage` twice; see `core.block.Block`.

        Args:
            stage: the products.
            receive: as there.
            exact: the samples on their way through blocks that are not rounded.
            unrounded: has this block computed with the weights that it had before, as long as its context lasts.
        """
        tokens: Counter[Unit] = Counter()
        for index in range(len(self._samples)):
            ours: dict[Product, list[Tensor]] = {product: [] for product in stage}
            theirs: dict[Product, list[Tensor]] = {product: [] for product in stage}
            self._reach(stage, index, self._samples, lambda product, rows, to=ours: to[product].append(rows))
            with unrounded():
                self._reach(stage, index, exact, lambda product, rows, to=theirs: to[product].append(rows))
            every = hidden_of(exact.call(self._site, index)).shape[:-1].numel()
            for product in stage:
                unit = self.unit(product.linears[0])
                alike = unit[1] is None and [len(rows) for rows in ours[product]] == [every] == [
                    len(rows) for rows in theirs[product]
                ]
                for rows in ours[product]:
                    tokens[unit] += len(rows)
                    receive(product, rows, theirs[product][0] if alike else None)
        self._note_experts(stage, tokens)

    def _note_experts(self, stage: Stage, tokens: Mapping[Unit, int]) -> None:
        units = [self.unit(product.linears[0]) for product in stage]
        self.expert_tokens.update({unit: tokens[unit] for unit in units if unit[1] is not None})

    def _reach(self, stage: Stage, index: int, samples: Replay, receive: Callable[[Product, Tensor], None]) -> None:
        """Run one batch as far as `stage`, and no further where it is known to come to each product once."""
        units = {self.unit(product.linears[0]): product for product in stage}
        addresses = {address: unit for address, unit in self._addresses().items() if unit in units}
        single = all(unit[1] is None and self._once.get(unit, False) for unit in units)
        missing = set(units)

        def see(unit: Unit, tensor: Tensor) -> None:
            product = units[unit]
            rows = tensor.reshape(-1, product.in_features)
            # A sum that is finite proves it without a copy; one that overflows falls to the test.
            if not (bool(torch.isfinite(rows.sum())) or bool(torch.isfinite(rows).all())):
                raise LlmoptError(
                    f"the input of `{product.linears[0].name}` holds NaN or Inf",
                    where=f"calibration batch {index + 1} of {len(samples)}",
                    hint="the model overflows on this text: check its weights",
                )
            receive(product, rows)
            missing.discard(unit)
            if single and not missing:
                raise _Enough

        self._run(index, addresses, see, samples=samples)

    def norms(self, product: Product) -> list[tuple[str, nn.Module]]:
        """Return the norms whose output a product reads, and the path of each."""
        self.stages()
        return self._norms.get(self.unit(product.linears[0]), [])

    def earlier(self, product: Product) -> list[Linear]:
        """Return the layers that the forward pass reaches before a product, of its own expert, the nearest first."""
        stages = self.stages()
        at = next(index for index, stage in enumerate(stages) for one in stage if product.linears[0] in one.linears)
        linears = [linear for stage in reversed(stages[:at]) for one in stage for linear in reversed(one.linears)]
        expert = self.unit(product.linears[0])[1]
        return [linear for linear in linears if expert is None or self.unit(linear)[1] == expert]

    def _run(
        self,
        index: int,
        addresses: dict[int, Unit],
        receive: Callable[[Unit, Tensor], None],
        *,
        samples: Replay | None = None,
        tokens: int | None = None,
    ) -> None:
        args, kwargs = (self._samples if samples is None else samples).call(self._site, index, tokens=tokens)
        with torch.no_grad(), Watch(addresses, receive):
            try:
                self._site.module(*args, **kwargs)
            except _Enough:
                return

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        for path, module in self._site.module.named_modules():
            yield f"{self._site.name}.{path}", module

    def unit(self, linear: Linear) -> Unit:
        """Return the parameter that holds a layer, and which expert of it the layer is."""
        view = self._views[linear]
        return view.parameter, view.rows.expert if view.rows is not None else None

    def _addresses(self) -> dict[int, Unit]:
        addresses: dict[int, Unit] = {}
        for linear, view in self._views.items():
            parameter = self._skeleton.parameter(view.parameter).data
            addresses[view.address(parameter)] = self.unit(linear)
        return addresses

    def _members(self, unit: Unit) -> tuple[Linear, ...]:
        return tuple(linear for linear in self._views if self.unit(linear) == unit)

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
                experts = dict.fromkeys(self.unit(linear) for linear in self._views)
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
