"""Rotating a model's channels, block by block, and proving of each block that it computes the same.

Of a block f it is shown that the rotated one g gives g(x Q) - x Q = (f(x) - x) Q on random tokens, of the embeddings
that they give x Q, and of the last norm and the head that they make the same of x Q as before of x. Together these are
the model. What is compared is a block's update and not its output, in which a stream of large values would hide it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.block import Product
from ..core.errors import LlmoptError, UsageError
from ..core.model import Rotation, RotationReport
from ..core.progress import Reporter
from .blocks import LoadedBlock, loaded
from .ends import Ends, find_ends
from .outside import outside_on_demand
from .producers import Producer, same
from .replay import Call, Replay, hidden_of
from .residual import Roles, block_roles, refusal
from .skeleton import BlockSite, Skeleton
from .text import proof_batches
from .turning import Turn, Turns, along

if TYPE_CHECKING:
    from .handle import TorchModel

Maker = Callable[[int], Rotation]

_EXACT = 1e-3
"""Largest difference of a block's update, computed in float32 with unrounded weights."""

_STRAY = 0.1
"""Share of the tokens that may differ in a mixture: where two experts score alike, rounding decides between them."""

_ROUNDINGS = 16
"""How many units in the last place of the stored dtype embeddings and log probabilities may differ by."""


def rotate(
    model: TorchModel, residual: Maker | None, values: Maker | None, *, seed: int, reporter: Reporter
) -> tuple[TorchModel, RotationReport]:
    """Rotate a model; see `core.model.ModelHandle`."""
    skeleton = model.skeleton()
    if skeleton.model.main_input_name != "input_ids":
        raise UsageError(
            f"{type(skeleton.model).__name__} takes {skeleton.model.main_input_name}, `rotate` is proven with text",
            hint="leave `rotate` out",
        )
    if residual is not None and len(skeleton.stacks) != 1:
        raise refusal(skeleton, f"it has {len(skeleton.stacks)} stacks of blocks, each with a stream of its own")
    return _Rotator(model, skeleton, residual, values, seed).run(reporter)


@dataclass(slots=True)
class _Done:
    """What was done so far."""

    changed: list[str] = field(default_factory=list[str])
    skipped: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    folded: int = 0
    paired: int = 0
    difference: float = 0.0


class _Rotator:
    """One rotation of one model."""

    def __init__(
        self, model: TorchModel, skeleton: Skeleton, residual: Maker | None, values: Maker | None, seed: int
    ) -> None:
        self._model = model
        self._skeleton = skeleton
        self._residual = residual
        self._values = values
        self._batches = proof_batches(skeleton, seed)
        self._replay = Replay(skeleton, self._batches)
        self._stream: Rotation | None = None
        self._heads: dict[int, Rotation] = {}
        self._done = _Done()
        self._first: Tensor | None = None
        self._last: Any = None

    def run(self, reporter: Reporter) -> tuple[TorchModel, RotationReport]:
        """Rotate block after block, then what lies outside of them."""
        skeleton, model, done = self._skeleton, self._model, self._done
        ends: Ends | None = None
        difference = None
        with outside_on_demand(skeleton, model.read), torch.no_grad():
            with reporter.step("rotate", len(skeleton.sites)) as step:
                for stack in skeleton.stacks:
                    for site in stack:
                        self._block(site, first=site is stack[0])
                        if self._stream is not None and ends is None:
                            # Looked at before the rest of the blocks: what cannot be rotated is refused early.
                            ends = find_ends(skeleton, self._outputs, self._stream.width)
                        step.advance(detail=site.name)
            expected = self._outputs() if ends is not None else {}
        if ends is not None:
            self._skip_unused()
            model = self._turn_ends(ends)
            difference = self._prove_ends(model, expected)
        untied = ends.untied if ends is not None else None
        return model, RotationReport(
            changed=tuple(done.changed),
            skipped=tuple(done.skipped),
            folded=done.folded,
            paired=done.paired,
            block_difference=done.difference,
            logit_difference=difference,
            untied=untied,
        )

    def _block(self, site: BlockSite, *, first: bool) -> None:
        skeleton, model = self._skeleton, self._model
        with loaded(skeleton, site, model, self._replay) as block:
            made = _run(site, self._replay.call(site, 0))
            turns = Turns()
            roles = self._find_stream(site, turns) if self._residual is not None else Roles()
            if self._values is not None:
                self._pair(block, turns)
            call = self._replay.call(site, 0)  # a new one each time: a block may write to the cache it is given
            self._replay.finish(site, first=first)
            changed = self._load_turned(site, turns)
            self._prove(site, call, made, roles)
            model.store.put(site.name, {}, changed=changed)
            self._done.changed += changed
            self._last = made

    def _find_stream(self, site: BlockSite, turns: Turns) -> Roles:
        """Add what a rotation of the residual stream does to a block."""
        assert self._residual is not None, "asked for"
        call = self._replay.call(site, 0)
        if self._stream is None:
            self._first = hidden_of(call)
            self._stream = self._residual(self._first.shape[-1])
        skeleton = self._skeleton
        roles = block_roles(skeleton, site, lambda: _run(site, call), self._stream.width)
        if not roles.readers:
            raise refusal(skeleton, f"no layer of `{site.name}` reads what a norm makes of the stream")
        for name, norm in roles.readers.items():
            self._add(turns, name, scale=norm.multiplier, columns=self._stream)
        for name in roles.writers:
            self._add(turns, name, rows=self._stream)
        for name in roles.biases:
            self._add(turns, name, rows=self._stream, vector=True)
        folded = {norm.path: norm for norm in roles.readers.values() if norm.multiplier is not None}
        for path, norm in folded.items():
            self._add(turns, f"{path}.weight", fill=norm.one)
        self._done.folded += len(folded)
        return roles

    def _add(self, turns: Turns, parameter: str, **changes: Any) -> None:
        """Add to what is done to the checkpoint tensors that a parameter is made of."""
        sources = self._skeleton.sources(parameter)
        if sources is None:
            raise refusal(self._skeleton, f"the tensors that `{parameter}` is made of do not lie in it row by row")
        for name, transposed in sources.items():
            turns.add(name, transposed=transposed, **changes)

    def _pair(self, block: LoadedBlock, turns: Turns) -> None:
        """Add rotations of the heads' values: the rows that make them, and the columns that read them."""
        found = False
        for product in [product for stage in block.stages() for product in stage]:
            size = block.head_size(product)
            producer = self._value_rows(block, product, size) if size is not None else None
            if size is None or producer is None:
                continue
            found, rotation = True, self._head(size)
            gain = _gain(block, product, producer, turns)
            scale = 1 / gain[producer.channels]
            for linear in product.linears:
                turned = linear in block.transposed
                turns.add(f"{linear.name}.weight", scale=scale, columns=rotation, transposed=turned)
            maker = next(linear for linear in block.linears if linear.name == producer.name)
            start = maker.out_features - producer.width
            for part in producer.parts:
                vector = part.tensor.ndim == 1
                turned = not vector and maker in block.transposed
                turns.add(part.name, gain=gain, rows=rotation, start=start, transposed=turned, vector=vector)
            self._done.paired += len(product.linears)
        if not found:
            self._done.skipped.append((block.name, "no layer makes its heads' values in rows of its own"))

    def _value_rows(self, block: LoadedBlock, product: Product, size: int) -> Producer | None:
        """Return the rows that make a product's input and can be rotated head by head along with it, by trial."""
        stored = self._model.checkpoint
        if product.in_features % size or any(f"{linear.name}.weight" not in stored for linear in product.linears):
            return None
        candidates = [one for one in block.earlier_rows(product) if one.width % size == 0]
        views = [block.weight(linear) for linear in product.linears]
        with _restored(views):
            expected, rotation = block.output(0), self._head(size)
            for view in views:
                view.copy_(along(rotation, view))
            if same(expected, block.output(0)):
                return None  # no token comes to it, so nothing could be proven
            for one in candidates:
                with _restored([part.tensor for part in one.parts]):
                    for part in one.parts:
                        turn = Turn(rows=rotation, vector=part.tensor.ndim == 1)
                        part.tensor.copy_(turn.apply(part.tensor, torch.float32)[0])
                    if same(expected, block.output(0)):
                        return one
        return None

    def _head(self, size: int) -> Rotation:
        assert self._values is not None, "asked for"
        if size not in self._heads:
            self._heads[size] = self._values(size)
        return self._heads[size]

    def _load_turned(self, site: BlockSite, turns: Turns) -> dict[str, Tensor]:
        """Load the block's weights turned, unrounded; return them rounded to the dtype they are stored in."""
        shared = set(turns.of).intersection(self._done.changed)
        if shared:
            raise refusal(self._skeleton, f"`{min(shared)}` is used by several blocks")
        changed: dict[str, Tensor] = {}

        def read(name: str) -> Tensor:
            tensor = self._model.read(name)
            if name not in turns.of:
                return tensor
            wide, changed[name] = turns.apply(name, tensor, torch.float32, tensor.dtype)
            return wide

        self._skeleton.load(site.parameters, read)
        return changed

    def _prove(self, site: BlockSite, call: Call, made: Any, roles: Roles) -> None:
        """Compare the update of the turned block, its weights loaded, with the turned update."""
        given, turned = hidden_of(call), self._turned_call(call)
        again = _states(_run(site, turned))
        expected = self._turned(_states(made).double() - given.double())
        got = again.double() - hidden_of(turned).double()
        off = (got - expected).abs().amax(-1).flatten() / expected.abs().max().clamp_min(1e-30)
        mixture = any(view.rows is not None and view.rows.expert is not None for view in site.views)
        allowed = int(_STRAY * len(off)) if mixture else 0
        difference = float(off.sort().values[len(off) - 1 - allowed])
        self._done.difference = max(self._done.difference, difference)
        if difference <= _EXACT:
            return
        if self._stream is None:
            raise LlmoptError(
                f"`{site.name}` computes something else when the values of its heads are rotated",
                where=f"its update is off by {difference:.2g} of its largest value",
                hint="leave them as they are with `values: false`",
            )
        unread = f"; `{roles.unread[0]}` weighs something else than what layers read" if roles.unread else ""
        raise refusal(
            self._skeleton, f"`{site.name}` rotated does not give the rotated output: off by {difference:.2g}{unread}"
        )

    def _turned(self, states: Tensor) -> Tensor:
        return states if self._stream is None else self._stream.turn(states)

    def _turned_call(self, call: Call) -> Call:
        given = hidden_of(call)
        turned = self._turned(given).to(given.dtype)
        args = tuple(turned if value is given else value for value in call[0])
        return args, {key: turned if value is given else value for key, value in call[1].items()}

    def _outputs(self) -> dict[str, Tensor]:
        """Run what follows the blocks on what the last finished one returned."""
        return self._replay.outputs(self._skeleton.sites[-1], 0, self._last, self._model.read)

    def _turn_ends(self, ends: Ends) -> TorchModel:
        """Write what lies outside the blocks; return the model, its head untied if it has to be."""
        assert self._stream is not None, "there are ends of a stream"
        model = self._model
        if ends.must_untie:
            model, names = model.untie()
            ends.untied = names[0] if names else None
        skeleton, turns = model.skeleton(), Turns()
        for name in ends.embeddings:
            turns.add(_stored_name(skeleton, name), columns=self._stream)
        for name, multiplier in ends.readers.items():
            turns.add(_stored_name(skeleton, name), scale=multiplier, columns=self._stream)
        for name, one in ends.norms.items():
            turns.add(_stored_name(skeleton, name), fill=one)
        for name in turns.of:
            tensor = model.read(name)
            (turned,) = turns.apply(name, tensor, tensor.dtype)
            model.store.put(name, {}, changed={name: turned})
        self._done.folded += len(ends.norms)
        self._done.changed += turns.of
        return model

    def _skip_unused(self) -> None:
        """Say which tensors still expect the stream as it was, such as the layers that predict several tokens."""
        assert self._stream is not None, "there are ends of a stream"
        for name in self._skeleton.naming.unused:
            if self._stream.width in self._model.checkpoint.tensors[name].shape:
                self._done.skipped.append((name, "the model does not use it, so nothing shows how it reads the stream"))

    def _prove_ends(self, model: TorchModel, expected: dict[str, Tensor]) -> float:
        """Compare the rotated embeddings, and what the rotated head makes of the rotated stream; return the latter."""
        assert self._first is not None, "the stream was met"
        skeleton = model.skeleton()
        replay = Replay(skeleton, self._batches)
        made = _with_states(self._last, lambda states: self._turned(states).to(states.dtype))
        with outside_on_demand(skeleton, model.read, keep=False):
            begin = hidden_of(replay.call(skeleton.sites[0], 0))
            got = replay.outputs(skeleton.sites[-1], 0, made, model.read)
        limit = max(_EXACT, _ROUNDINGS * torch.finfo(getattr(torch, model.facts.dtype)).eps)
        if (off := _difference(begin, self._turned(self._first))) > limit:
            raise refusal(skeleton, f"the embeddings rotated do not give the rotated stream: off by {off:.2g}")
        off = max(_difference(got[name], value) for name, value in expected.items() if value.is_floating_point())
        if off > limit:
            raise refusal(skeleton, f"what follows the blocks does not make the same of the rotated stream: {off:.2g}")
        return off


def _gain(block: LoadedBlock, product: Product, producer: Producer, turns: Turns) -> Tensor:
    """Return what to multiply the rows that make values by, (channels,) float64, and to divide their columns by.

    A rotation mixes the channels of a head, whose rows and columns may be of any scale as long as they match; the error
    of a channel of large rows would then drown those of small ones. So rows and columns are made equally long first
    (Nagel et al., 2019, Data-free quantization).
    """
    weight = next(part for part in producer.parts if part.tensor.ndim == 2)
    folded = turns.of[weight.name].scale if weight.name in turns.of else None
    rows = weight.tensor.double() if folded is None else weight.tensor.double() * folded
    columns = torch.zeros(producer.width, dtype=torch.float64)
    for linear in product.linears:
        columns.index_add_(0, producer.channels, block.weight(linear).double().square().sum(0))
    gain = (columns.sqrt() / rows.norm(dim=1)).sqrt()
    return torch.where(gain.isfinite() & (gain > 0), gain, 1.0)


def _stored_name(skeleton: Skeleton, parameter: str) -> str:
    name = skeleton.checkpoint_name(parameter)
    if name is None:
        raise refusal(skeleton, f"`{parameter}` is made of several tensors")
    return name


def _run(site: BlockSite, call: Call) -> Any:
    return site.module(*call[0], **call[1])


def _states(made: Any) -> Tensor:
    return made if isinstance(made, Tensor) else made[0]


def _with_states(made: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(made) if isinstance(made, Tensor) else (change(made[0]), *made[1:])


def _difference(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest value."""
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))


@contextmanager
def _restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put tensors back as they were."""
    kept = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, before in zip(tensors, kept, strict=True):
            tensor.copy_(before)
