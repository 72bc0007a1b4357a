"""Narrower layers: neurons, heads and channels of the residual stream taken out of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ..core.block import Block, Linear, Product
from ..core.errors import UsageError
from ..core.facts import LinearFacts, ModelFacts
from ..core.model import Channels, ChannelSet, ModelHandle, WidthKind
from ..core.params import Params
from ..core.passes import Need, PassContext, PassResult, SurveyPass
from ..core.sizes import group_setting, head_setting, head_size_setting, hidden_setting, mlp_settings
from ..core.target import Target
from .amounts import amount
from .products import in_parts, unreached

if TYPE_CHECKING:
    from torch import Tensor

Amount = Annotated[int, Meta(ge=1)] | str | None
_KINDS: tuple[Literal["mlp", "heads", "hidden"], ...] = ("mlp", "heads", "hidden")
_WIDE = 512
_MULTIPLES = (8, 32)
"""What widths are rounded to by default: the second from `_WIDE` on."""


class PruneWidthParams(Params, frozen=True, kw_only=True):
    """Parameters of `prune-width`."""

    mlp: Annotated[
        Amount,
        Meta(description="Neurons to take out of every MLP, or of every expert: a number, or a share such as `30%`."),
    ] = None
    heads: Annotated[
        Amount,
        Meta(
            description="Attention heads to take out of every layer: key and value heads, each with all queries that "
            "share it; a number, or a share."
        ),
    ] = None
    hidden: Annotated[
        Amount, Meta(description="Channels to take out of the residual stream: a number, or a share.")
    ] = None
    multiple: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(
            description="What the widths of MLPs and of the residual stream are rounded to. By default 32, and 8 where "
            "there are fewer than 512."
        ),
    ] = None
    importance: Annotated[
        Literal["contribution", "activation"],
        Meta(
            description="What tells how much a unit matters: the energy of its activations times that of the weights "
            "that read them (`contribution`), or of its activations alone (`activation`)."
        ),
    ] = "contribution"
    refit: Annotated[
        bool,
        Meta(
            description="Fit the weights that read what is left, by least squares on the calibration data, to what was "
            "read before; for MLPs and heads."
        ),
    ] = True


class PruneWidth(SurveyPass[PruneWidthParams]):
    """Take out the neurons, heads or channels that matter least, by their activations (Minitron: Muralidharan, 2024).

    Layers stay alike, as config.json demands: each loses as many, and chooses which by itself; the residual stream
    loses the same channels everywhere. Which axes of which weights they are is read off from what another size in
    config.json changes, and proven: with its units in another order the model answers as before. The weights that read
    what is left are fitted by least squares to what was read before, block after block. Most of what is lost beyond
    that is won back by training.
    """

    name = "prune-width"
    needs = frozenset({Need.CALIBRATION})
    not_after = frozenset({"allocate-bits", "sparsify"})
    before_rounding = True
    Params = PruneWidthParams

    def __init__(self, params: PruneWidthParams) -> None:
        super().__init__(params)
        self._channels: Channels | None = None
        self._sets: dict[str, ChannelSet] = {}
        self._of_reader: dict[str, list[ChannelSet]] = {}
        self._kept: dict[str, list[int]] = {}
        self._scores: dict[str, Tensor] = {}

    @property
    def _kinds(self) -> list[WidthKind]:
        return [kind for kind in _KINDS if getattr(self.params, kind) is not None]

    def check(self, facts: ModelFacts, target: Target) -> None:  # noqa: ARG002
        """Refuse to take nothing or everything away, as far as config.json tells."""
        where = f"pass `{self.name}`"
        if not self._kinds:
            raise UsageError(
                "nothing to prune", where=where, hint="say how much: `mlp: 30%`, `heads: 1`, `hidden: 25%`"
            )
        if self.params.hidden is not None and facts.is_encoder_decoder:
            raise UsageError(
                f"the hidden size of {facts.architecture or facts.source} cannot be pruned",
                where=f"{where}: an encoder-decoder has several residual streams, and one size for them",
                hint="leave `hidden` out",
            )
        for kind, name, units in self._outline_units(facts):
            self._keep(kind, units, f"{where}, `{name}`")

    def facts_after(self, facts: ModelFacts) -> ModelFacts:
        """Return the outline with narrower layers, as far as config.json tells which they are."""
        narrowed = {
            kind: {units: self._keep(kind, units, "") for one, _, units in self._outline_units(facts) if one == kind}
            for kind in _KINDS
        }
        heads, groups, size = head_setting(facts.config), group_setting(facts.config), head_size_setting(facts.config)
        stream = hidden_setting(facts.config)
        widths: dict[int, int] = {}
        for old, new in narrowed["mlp"].items():
            widths |= {old: new, 2 * old: 2 * new}
        if heads is not None and size is not None:
            for old, new in narrowed["heads"].items():
                repeats = heads[1] // old if groups is not None else 1
                shares = (repeats * size[1], size[1], (repeats + 2) * size[1])
                widths |= {share * old: share * new for share in shares}
        across = narrowed["hidden"]
        linears = tuple(_narrowed(one, widths, across, None if stream is None else stream[1]) for one in facts.linears)
        before = sum(one.out_features * one.in_features for one in facts.linears)
        after = sum(one.out_features * one.in_features for one in linears)
        outside = facts.outside_bytes
        for old, new in across.items():
            outside = outside * new // old
        width = facts.bytes / max(1, facts.parameters)
        nbytes = facts.bytes - facts.outside_bytes + outside - int((before - after) * width)
        return msgspec.structs.replace(
            facts, linears=linears, bytes=nbytes, parameters=int(nbytes / width), outside_bytes=outside
        )

    def begin(self, model: ModelHandle, context: PassContext) -> None:
        """Find the axes that lose units, and prove them."""
        self._channels = model.channels(
            self._kinds, seed=context.seed, keep=lambda kind, units: self._keep(kind, units, f"pass `{self.name}`")
        )
        self._sets = {one.name: one for one in self._channels.sets}
        self._of_reader = {}
        for one in self._channels.sets:
            self._keep(one.kind, one.units, f"pass `{self.name}`, `{one.size}`")
            for reader in one.readers:
                self._of_reader.setdefault(reader, []).append(one)

    def run_block(self, block: Block, linears: Iterable[Linear], context: PassContext) -> PassResult:  # noqa: ARG002
        """Choose what stays of the block's MLPs and heads, and fit what reads it."""
        result = PassResult(skipped=unreached(block, [one for one in block.linears if one.name in self._of_reader]))
        products = tuple(
            product for stage in block.stages() for product in stage if product.linears[0].name in self._of_reader
        )
        scores = self._measure(block, products, result)
        for name in scores:
            one = self._sets[name]
            if one.kind == "hidden":
                total = self._scores.get(name)
                share = scores[name] / scores[name].sum().clamp_min(1e-30)
                self._scores[name] = share if total is None else total + share
            else:
                self._choose(one, scores[name], result)
        for stage in block.stages():
            chosen = tuple(product for product in stage if self._inner(product) is not None)
            for part in in_parts(chosen, context.statistics_bytes):
                self._narrow(block, part, result)
        return result

    def findings(self) -> dict[str, Any]:
        """Return the units that stay, and the scores of the stream's so far."""
        scores = {name: [str(one.dtype).removeprefix("torch."), one.tolist()] for name, one in self._scores.items()}
        return {"kept": self._kept, "scores": scores}

    def take_up(self, findings: dict[str, Any]) -> None:
        """Go on with what was chosen of the first blocks."""
        import torch

        self._kept = {name: list(units) for name, units in findings["kept"].items()}
        self._scores = {
            name: torch.tensor(scores, dtype=getattr(torch, dtype))
            for name, (dtype, scores) in findings["scores"].items()
        }

    def conclude(self, model: ModelHandle, context: PassContext) -> tuple[ModelHandle, PassResult]:  # noqa: ARG002
        """Take out what was not chosen."""
        assert self._channels is not None, "begin() found them"
        result = PassResult()
        for name, scores in self._scores.items():
            self._choose(self._sets[name], scores, result)
        unmeasured = [name for name in self._sets if name not in self._kept]
        if unmeasured:
            raise UsageError(
                f"nothing was measured of {len(unmeasured)} of {len(self._sets)} sets of units",
                where=f"pass `{self.name}`: the calibration samples do not reach `{unmeasured[0]}`",
                hint="use more calibration data",
            )
        for size in dict.fromkeys(one.size for one in self._sets.values()):
            units, kept = next(
                (one.units, len(self._kept[one.name])) for one in self._sets.values() if one.size == size
            )
            result.notes.append(f"{size}: {units} units became {kept}")
        narrower = self._channels.kept(model, self._kept)
        before, after = model.facts.parameters, narrower.facts.parameters
        result.metrics |= {"parameters_before_count": before, "parameters_after_count": after}
        self._channels, self._sets, self._kept, self._scores = None, {}, {}, {}
        return narrower, result

    def _measure(self, block: Block, products: tuple[Product, ...], result: PassResult) -> dict[str, Tensor]:
        """Return how much each unit of each set matters, (units,), summed over what reads it."""
        import torch

        from .numerics.narrowing import Energy, scores_of_units

        energies = {product: Energy(product.in_features) for product in products}
        if products:
            block.collect(products, lambda product, rows: energies[product].add(rows))
        scores: dict[str, Tensor] = {}
        for product, energy in energies.items():
            columns = energy.mean
            if not energy.tokens:
                columns = torch.ones(product.in_features)
                result.notes.append(
                    f"{product.linears[0].name}: no calibration token reaches it; chosen by its weights"
                )
            if self.params.importance == "contribution" or not energy.tokens:
                columns = columns * sum(block.weight(one).square().sum(0) for one in product.linears)
            for one in self._of_reader[product.linears[0].name]:
                units = scores_of_units(columns, one.readers[product.linears[0].name], one.units)
                scores[one.name] = scores[one.name] + units if one.name in scores else units
        return scores

    def _choose(self, one: ChannelSet, scores: Tensor, result: PassResult) -> None:
        keep = self._keep(one.kind, one.units, f"pass `{self.name}`")
        kept = scores.topk(keep).indices.sort().values
        self._kept[one.name] = kept.tolist()
        lost = 1 - float(scores[kept].sum() / scores.sum().clamp_min(1e-30))
        result.metrics[f"{one.kind}_importance_lost_max_ratio"] = max(
            lost, result.metrics.get(f"{one.kind}_importance_lost_max_ratio", 0.0)
        )

    def _inner(self, product: Product) -> ChannelSet | None:
        """Return the set of an MLP or of heads that a product reads, None for one that reads none."""
        sets = self._of_reader.get(product.linears[0].name, ())
        return next((one for one in sets if one.kind != "hidden"), None)

    def _narrow(self, block: Block, stage: tuple[Product, ...], result: PassResult) -> None:
        """Put zeros in the columns that read what goes, and fit the others."""
        import torch

        from .numerics.hessian import Hessian
        from .numerics.narrowing import columns_of_units, refit

        hessians = {product: Hessian(product.in_features) for product in stage} if self.params.refit else {}
        if hessians:
            block.collect(stage, lambda product, rows: hessians[product].add(rows))
        for product in stage:
            one = self._inner(product)
            assert one is not None, "chosen by it"
            parts = one.readers[product.linears[0].name]
            columns = columns_of_units(torch.tensor(self._kept[one.name]), parts, one.units)
            hessian = hessians.pop(product).matrix if hessians else None
            for linear in product.linears:
                weight = block.weight(linear)
                if hessian is None:
                    made = torch.zeros_like(weight)
                    made[:, columns] = weight[:, columns]
                else:
                    made = refit(weight, hessian, columns)
                block.update(linear, made)
                result.changed.append(linear.name)

    def _keep(self, kind: WidthKind, units: int, where: str) -> int:
        """Return how many of `units` stay.

        Raises:
            UsageError: none, or all of them.
        """
        wanted = getattr(self.params, kind)
        gone = amount(wanted, units, where=where)
        if kind == "heads":
            return units - gone
        multiple = self.params.multiple or _MULTIPLES[units >= _WIDE]
        kept = max(1, round((units - gone) / multiple)) * multiple
        if kept >= units:
            raise UsageError(
                f"`{kind}: {wanted}` takes nothing away",
                where=f"{where}: {units - gone} of {units} would be left, rounded to a multiple of {multiple} {kept}",
                hint="take more away, or give a smaller `multiple`",
            )
        return kept

    def _outline_units(self, facts: ModelFacts) -> Iterable[tuple[WidthKind, str, int]]:
        """Yield what config.json says of the sizes that are pruned: kind, setting and number."""
        if self.params.mlp is not None:
            used = {width for one in facts.linears for width in (one.in_features, one.out_features)}
            for name, value in mlp_settings(facts.config).items():
                if value is not None and (value in used or 2 * value in used):
                    yield "mlp", name, value
        heads, groups, hidden = (
            head_setting(facts.config),
            group_setting(facts.config),
            hidden_setting(facts.config),
        )
        if self.params.heads is not None and (number := groups or heads) is not None:
            yield "heads", number[0], number[1]
        if self.params.hidden is not None and hidden is not None:
            yield "hidden", hidden[0], hidden[1]


def _narrowed(
    linear: LinearFacts, widths: Mapping[int, int], across: Mapping[int, int], stream: int | None
) -> LinearFacts:
    """Return a layer with other widths: one side of it is the stream's, the other that of an MLP or of heads."""
    rows, columns = linear.out_features, linear.in_features
    if columns == stream:
        rows, columns = widths.get(rows, rows), across.get(columns, columns)
    elif rows == stream:
        rows, columns = across.get(rows, rows), widths.get(columns, columns)
    return msgspec.structs.replace(linear, out_features=rows, in_features=columns)
