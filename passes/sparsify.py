"""Zeros among the weights: shapes stay, and what comes later keeps the zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import ceil
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from ..core.block import Block, Linear, Product
from ..core.errors import UsageError
from ..core.facts import ModelFacts
from ..core.params import Ignore, Params
from ..core.passes import BlockPass, Need, PassContext, PassResult, Skip
from ..core.patterns import check_patterns
from ..core.target import Target
from .amounts import share
from .products import NO_TOKEN, among, in_parts, unreached

if TYPE_CHECKING:
    from torch import Tensor

    from .numerics.sparsity import Pattern

_DEFAULT = "50%"
_MIN_TOKENS = 1 / 64
"""A layer that fewer calibration tokens reach than this share of its inputs has too little of a Hessian."""

Make = Callable[["Tensor"], "Tensor"]


class SparsifyParams(Params, frozen=True, kw_only=True):
    """Parameters of `sparsify`."""

    method: Annotated[
        Literal["magnitude", "wanda", "sparsegpt"],
        Meta(
            description="What goes: the smallest weights of a layer (`magnitude`, without data), the smallest of each "
            "row times the length of their inputs (`wanda`), or those whose absence the weights still to come make up "
            "for best (`sparsegpt`)."
        ),
    ] = "sparsegpt"
    pattern: Annotated[
        Literal["unstructured", "2:4", "4:8"],
        Meta(description="Where zeros may lie: anywhere, or so that n of every m neighbours in a row are left."),
    ] = "unstructured"
    sparsity: Annotated[
        str | None, Meta(description="Share of a layer's weights that become zero; 50% when not given, as in 2:4.")
    ] = None
    ignore: Ignore = ()
    damping: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="Share of the mean diagonal added to the Hessian of `sparsegpt`; raised tenfold until Cholesky "
            "succeeds.",
        ),
    ] = 0.01


class Sparsify(BlockPass[SparsifyParams]):
    """Set weights to zero, the others making up for them (SparseGPT: Frantar and Alistarh, 2023), or not (Wanda).

    Zeros stay zeros in the passes that follow: whatever rounds weights afterwards puts them on zero, and gptq and
    autoround leave them out of what they change. Shapes stay as they are, so the artifact is as large as before where
    its format does not pack zeros, and faster only where a kernel uses the pattern.
    """

    name = "sparsify"
    not_after = frozenset({"sparsify"})
    before_rounding = True
    Params = SparsifyParams

    def requires(self) -> frozenset[Need]:
        """Return calibration data unless weights alone decide."""
        return frozenset() if self.params.method == "magnitude" else frozenset({Need.CALIBRATION})

    def ignored(self) -> tuple[str, ...]:
        """Return the patterns of layers that stay dense."""
        return self.params.ignore

    def check(self, facts: ModelFacts, target: Target) -> None:  # noqa: ARG002
        """Refuse a model without linear layers, a share that cannot be, a pattern that matches nothing."""
        where = f"pass `{self.name}`"
        if not facts.linears:
            raise UsageError(
                f"`{facts.source}` has no linear layers in repeated blocks",
                where=where,
                hint=f"leave `{self.name}` out",
            )
        if self.params.pattern != "unstructured" and self.params.sparsity not in (None, _DEFAULT):
            raise UsageError(
                f"{self.params.pattern} has a sparsity of its own",
                where=f"{where}: {self.params.sparsity} is given",
                hint="leave `sparsity` out, or use `pattern: unstructured`",
            )
        share(self.params.sparsity or _DEFAULT, where=where)
        check_patterns(self.params.ignore, [linear.name for linear in facts.linears], where=where)

    def run_block(self, block: Block, linears: Iterable[Linear], context: PassContext) -> PassResult:
        """Set weights of `linears` to zero, stage by stage."""
        result = PassResult()
        wanted = [linear for linear in linears if self._fits(linear, result)]
        if self.params.method == "magnitude":
            for linear in wanted:
                self._put(block, linear, self._by_magnitude, result)
            return result
        for stage in block.stages():
            for part in in_parts(among(stage, wanted), context.statistics_bytes):
                self._run_part(block, part, result)
        result.skipped += unreached(block, wanted)
        return result

    def _run_part(self, block: Block, products: tuple[Product, ...], result: PassResult) -> None:
        from .numerics.hessian import Hessian
        from .numerics.narrowing import Energy

        kind = Energy if self.params.method == "wanda" else Hessian
        gathered = {product: kind(product.in_features) for product in products}
        block.collect(products, lambda product, rows: gathered[product].add(rows))
        for product in products:
            statistics = gathered.pop(product)
            name = product.linears[0].name
            if isinstance(statistics, Energy):
                make = self._with_energy(statistics.mean) if statistics.tokens else self._by_magnitude
                if not statistics.tokens:
                    result.notes.append(f"{name}: {NO_TOKEN}; its smallest weights went")
            else:
                make = self._with_hessian(statistics, name, result)
            for linear in product.linears:
                self._put(block, linear, make, result)

    def _with_energy(self, energy: Tensor) -> Make:
        from .numerics.sparsity import wanda_mask

        return lambda weight: weight * wanda_mask(weight, energy, self._share, self._pattern)

    def _with_hessian(self, hessian: object, name: str, result: PassResult) -> Make:
        """Return how to make weights sparse, by what the Hessian allows."""
        from .numerics.hessian import Hessian, factorize
        from .numerics.sparsity import sparsegpt

        assert isinstance(hessian, Hessian)
        matrix = hessian.matrix
        least = ceil(_MIN_TOKENS * len(matrix))
        if not hessian.tokens:
            result.notes.append(f"{name}: {NO_TOKEN}; its smallest weights went")
            return self._by_magnitude
        energy = matrix.diagonal().clone()
        factor = None
        if hessian.tokens >= least:
            factor = factorize(matrix, damping=self.params.damping, act_order=False)
        if factor is None:
            why = f"{hessian.tokens} calibration tokens reach it, {least} are needed"
            why = why if hessian.tokens < least else "its Hessian cannot be factorized"
            result.notes.append(f"{name}: {why}; what is left was not changed")
            return self._with_energy(energy)
        result.metrics["damping_max_ratio"] = max(factor.damping, result.metrics.get("damping_max_ratio", 0.0))
        if factor.damping > self.params.damping or factor.double:
            precision = " in float64" if factor.double else ""
            result.notes.append(f"{name}: damping raised to {factor.damping:g}{precision} for Cholesky to succeed")
        return lambda weight: sparsegpt(weight, factor, self._share, self._pattern)

    def _by_magnitude(self, weight: Tensor) -> Tensor:
        from .numerics.sparsity import magnitude_mask

        return weight * magnitude_mask(weight, self._share, self._pattern)

    def _put(self, block: Block, linear: Linear, make: Make, result: PassResult) -> None:
        """Make a layer sparse and look at what was stored."""
        from .numerics.sparsity import most_in_group

        block.sparsify(linear, make(block.weight(linear)))
        stored = block.weight(linear)
        result.changed.append(linear.name)
        counts = {"weights_count": stored.numel(), "zero_weights_count": stored.numel() - int(stored.count_nonzero())}
        for name, value in counts.items():
            result.metrics[name] = result.metrics.get(name, 0) + value
        if self._pattern is not None:
            most = most_in_group(stored, self._pattern)
            name = "left_in_group_max_count"
            result.metrics[name] = max(most, result.metrics.get(name, 0))

    def _fits(self, linear: Linear, result: PassResult) -> bool:
        pattern = self._pattern
        if pattern is None or linear.in_features % pattern.group == 0:
            return True
        reason = f"its {linear.in_features} input features are not a multiple of {pattern.group}"
        result.skipped.append(Skip(linear.name, reason))
        return False

    @property
    def _share(self) -> float:
        return share(self.params.sparsity or _DEFAULT, where=f"pass `{self.name}`")

    @property
    def _pattern(self) -> Pattern | None:
        from .numerics.sparsity import Pattern

        if self.params.pattern == "unstructured":
            return None
        kept, _, group = self.params.pattern.partition(":")
        return Pattern(int(kept), int(group))
