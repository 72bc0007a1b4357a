"""One block in memory: the implementation of `core.model.Block`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..core.errors import LlmoptError
from ..core.model import Linear, Product, Stage
from ..core.quantized import QuantizedWeight
from .replay import Replay
from .skeleton import BlockSite, Skeleton, View
from .watch import Sighting, Unit, Watch, same_input


class _Enough(Exception):  # noqa: N818  (control flow, no error)
    """Every product of the stage was seen."""


class LoadedBlock:
    """A block whose weights are in memory as float32.

    Args:
        skeleton: the model.
        site: which block.
        dtype: the dtype its weights are stored in.
        replay: the calibration samples, None when no pass needs them.
    """

    def __init__(self, skeleton: Skeleton, site: BlockSite, dtype: str, replay: Replay | None) -> None:
        self._skeleton = skeleton
        self._site = site
        self._replay = replay
        self._views = {view.linear: view for view in site.views}
        self._once: dict[Unit, bool] = {}
        self.dtype = dtype
        self.results: dict[Linear, QuantizedWeight] = {}

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
        return self._view(self._views[linear])

    def quantize(self, linear: Linear, weight: QuantizedWeight) -> None:
        """Make `weight` the layer's weight."""
        self._view(self._views[linear]).copy_(weight.dequantize().float())
        self.results[linear] = weight

    def stages(self) -> list[Stage]:
        """Return the block's products in the order in which the forward pass reaches them."""
        seen: dict[Unit, Sighting] = {}
        for index in range(len(self._samples)):
            self._run(index, self._addresses(), lambda unit, tensor: _sight(seen, unit, tensor))
            break
        self._once = {unit: sighting.times == 1 for unit, sighting in seen.items()}
        return list(self._order(seen))

    def collect(self, stage: Stage, receive: Callable[[Product, Tensor], None]) -> None:
        """Run the calibration samples as far as `stage`; see `core.model.Block`."""
        units = {self._unit(product.linears[0]): product for product in stage}
        addresses = {address: unit for address, unit in self._addresses().items() if unit in units}
        single = all(unit[1] is None and self._once.get(unit, False) for unit in units)
        for index in range(len(self._samples)):
            missing = set(units)

            def see(unit: Unit, tensor: Tensor, missing: set[Unit] = missing) -> None:
                product = units[unit]
                rows = tensor.reshape(-1, product.in_features)
                if not bool(torch.isfinite(rows).all()):
                    raise LlmoptError(
                        f"the input of `{product.linears[0].name}` holds NaN or Inf",
                        where=f"calibration batch {index + 1} of {len(self._samples)}",  # noqa: B023
                        hint="the model overflows on this text: check its weights",
                    )
                receive(product, rows)
                missing.discard(unit)
                if single and not missing:
                    raise _Enough

            self._run(index, addresses, see)

    @property
    def _samples(self) -> Replay:
        assert self._replay is not None, "the plan gives calibration data to every pass that needs it"
        return self._replay

    def _run(self, index: int, addresses: dict[int, Unit], receive: Callable[[Unit, Tensor], None]) -> None:
        args, kwargs = self._samples.call(self._site, index)
        with torch.no_grad(), Watch(addresses, receive):
            try:
                self._site.module(*args, **kwargs)
            except _Enough:
                return

    def _view(self, view: View) -> Tensor:
        return view.of(self._skeleton.parameter(view.parameter).data)

    def _unit(self, linear: Linear) -> Unit:
        view = self._views[linear]
        return view.parameter, view.rows.expert if view.rows is not None else None

    def _addresses(self) -> dict[int, Unit]:
        addresses: dict[int, Unit] = {}
        for linear in self._views:
            name, expert = self._unit(linear)
            parameter = self._skeleton.parameter(name).data
            addresses[(parameter if expert is None else parameter[expert]).data_ptr()] = (name, expert)
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


@contextmanager
def loaded(
    skeleton: Skeleton, site: BlockSite, read: Callable[[str], Tensor], dtype: str, replay: Replay | None
) -> Iterator[LoadedBlock]:
    """Have one block's weights in memory."""
    skeleton.load(site.parameters, read)
    try:
        yield LoadedBlock(skeleton, site, dtype, replay)
    finally:
        skeleton.unload(site.parameters)
