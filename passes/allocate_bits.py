"""Mixed precision: which layer gets how many bits, under a budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from ..core.block import Block, Linear, Stage
from ..core.errors import UsageError
from ..core.facts import LinearFacts, ModelFacts
from ..core.model import ModelHandle
from ..core.params import Params
from ..core.passes import AllocationPass, Need, Pass, PassContext, PassResult
from ..core.quantized import BITS, Grid, QuantizedWeight
from ..core.target import Target
from .weights import WeightPass

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .numerics.allocation import Option

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_BUDGET = re.compile(rf"([0-9]+(?:\.[0-9]+)?)\s?(bpw|{'|'.join(_UNITS)})")
_SCALE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
_TRIAL_BITS = 3
"""At fewer bits one layer alone already leaves the range in which losses add up; at more it tells less."""


class AllocateBitsParams(Params, frozen=True, kw_only=True):
    """Parameters of `allocate-bits`."""

    budget: Annotated[
        str,
        Meta(
            description="What the quantized layers may take, scales included: bits per weight (`4.5bpw`) or bytes "
            "(`3GiB`, `900MB`). Embeddings and head are not counted.",
        ),
    ]
    choices: Annotated[
        tuple[Literal[2, 3, 4, 5, 6, 8], ...],
        Meta(min_length=1, description="The bits that a layer may get."),
    ] = BITS
    measure: Annotated[
        Literal["block", "kl"],
        Meta(
            description="What tells how much a layer matters when it alone is rounded: the KL divergence of the "
            "model's answers with the later blocks left out (`block`), or run too (`kl`), which takes time with the "
            "square of their number."
        ),
    ] = "block"


@dataclass(slots=True)
class _Part:
    """Layers that get the same bits, as an engine computes them together."""

    linears: list[Linear] = field(default_factory=list[Linear])
    errors: dict[int, float] = field(default_factory=dict[int, float])
    trial: dict[Linear, Tensor] = field(default_factory=dict[Any, Any])


class AllocateBits(AllocationPass[AllocateBitsParams]):
    """Choose the bits of every layer so that the model fits a budget and loses least.

    Stands before the pass that quantizes, which then uses the chosen bits in place of its own; its group size and
    overrides hold. Layers that engines fuse (query, key and value; gate and up; all experts of a block) get the same.

    Every layer is rounded alone to 3 bits and the loss is measured; for other widths it is scaled by the error of the
    layer's products over the calibration tokens, tr(dW H dWᵀ). Losses of layers add up nearly; the best choice under
    the budget is an integer programme.
    """

    name = "allocate-bits"
    needs = frozenset({Need.CALIBRATION})
    not_after = frozenset({"allocate-bits"})
    before_rounding = True
    Params = AllocateBitsParams

    def __init__(self, params: AllocateBitsParams) -> None:
        super().__init__(params)
        self._quantizer: WeightPass[Any] | None = None
        self._parts: list[tuple[list[Linear], list[Option]]] = []

    def prepare(self, later: Sequence[Pass[Any]]) -> None:
        """Find the pass that quantizes.

        Raises:
            UsageError: there is none.
        """
        self._quantizer = next((one for one in later if isinstance(one, WeightPass) and one.grid() is not None), None)
        if self._quantizer is None:
            raise UsageError(
                "nothing uses the bits that `allocate-bits` chooses",
                where="no pass after it quantizes weights",
                hint="put rtn, hqq, awq, gptq or autoround after it",
            )

    def check(self, facts: ModelFacts, target: Target) -> None:  # noqa: ARG002
        """Refuse a budget that cannot be read."""
        if self._quantizer is not None and self._quantizer.params.number != "int":
            raise UsageError(
                f"`{self.name}` chooses the bits of integers",
                where=f"pass `{self._quantizer.name}` makes {self._quantizer.params.number}",
                hint=f"leave `{self.name}` out, or `number` of `{self._quantizer.name}`",
            )
        found = _BUDGET.fullmatch(self.params.budget)
        if found is None or float(found[1]) == 0:
            raise UsageError(
                f"cannot read the budget `{self.params.budget}`",
                where=f"pass `{self.name}`: a number above 0, then bpw, {', '.join(_UNITS)}",
                hint="for example 4.5bpw or 3GiB",
            )

    def left_alone(self, name: str) -> str | None:
        """Return why the pass that quantizes leaves the layer alone."""
        return None if self._quantizer is None else self._quantizer.left_alone(name)

    def candidates(self, name: str) -> Sequence[Grid]:
        """Return the grids that a layer may get: one when an override fixes its bits."""
        if self._quantizer is None or self._quantizer.grid_for(name) is None:
            return ()
        return tuple(dict.fromkeys(self._grid(name, bits) for bits in sorted(self.params.choices)))

    def weight_bytes(self, facts: ModelFacts) -> int:
        """Return the bytes that the quantized layers will take at most.

        Raises:
            UsageError: even the smallest choice takes more than the budget.
        """
        scale_bits = _SCALE_BITS.get(facts.dtype, 32)
        sizes = [
            [_bytes(grid, linear, scale_bits) for grid in grids]
            for linear in facts.linears
            if (grids := self.candidates(linear.name))
        ]
        weights = sum(
            linear.out_features * linear.in_features for linear in facts.linears if self.candidates(linear.name)
        )
        least, most = sum(map(min, sizes)), sum(map(max, sizes))
        budget = self._budget(weights)
        if least > budget:
            raise self._too_small(least, weights)
        return int(min(most, budget))

    def run_block(self, block: Block, linears: Iterable[Linear], context: PassContext) -> PassResult:  # noqa: ARG002
        """Take the measure of `linears`."""
        import torch

        from .numerics.allocation import Option

        wanted = set(linears)
        dtype: torch.dtype = getattr(torch, block.dtype)
        parts: dict[str, _Part] = {}
        for number, stage in enumerate(block.stages()):
            # The experts of a block are one layer to an engine: several products in a stage are experts.
            part = parts.setdefault("experts" if len(stage) > 1 else str(number), _Part())
            self._round(block, stage, wanted, part, dtype)
        result = PassResult()
        for part in parts.values():
            if not part.linears:
                continue
            loss = block.divergence(part.trial, later_blocks=self.params.measure == "kl")
            part.trial.clear()
            reference = part.errors[self._trial_bits()]
            options = {
                size: Option(bits, size, loss * error / reference if reference else 0.0)
                for bits, error in sorted(part.errors.items(), reverse=True)
                for size in [sum(_bytes(self._grid(one.name, bits), one, 8 * dtype.itemsize) for one in part.linears)]
            }
            self._parts.append((part.linears, list(options.values())))
        return result

    def findings(self) -> list[Any]:
        """Return the layers of each part, and what each width would cost."""
        return [
            [
                [(one.name, one.out_features, one.in_features) for one in linears],
                [(option.bits, option.size, option.loss) for option in options],
            ]
            for linears, options in self._parts
        ]

    def take_up(self, findings: list[Any]) -> None:
        """Go on with the parts of the first blocks."""
        from .numerics.allocation import Option

        self._parts = [
            ([Linear(*one) for one in linears], [Option(*option) for option in options])
            for linears, options in findings
        ]

    def conclude(self, model: ModelHandle, context: PassContext) -> tuple[ModelHandle, PassResult]:  # noqa: ARG002
        """Solve for the best bits of all layers; the model stays as it is.

        Raises:
            UsageError: even the smallest choice takes more than the budget.
        """
        from .numerics.allocation import allocate

        weights = sum(one.out_features * one.in_features for linears, _ in self._parts for one in linears)
        chosen = allocate([options for _, options in self._parts], self._budget(weights))
        if chosen is None:
            least = sum(min(option.size for option in options) for _, options in self._parts)
            raise self._too_small(least, weights)
        result = PassResult()
        counts: dict[int, int] = {}
        for (linears, _), option in zip(self._parts, chosen, strict=True):
            for linear in linears:
                bits = self._grid(linear.name, option.bits).bits
                result.allocation[linear.name] = bits
                counts[bits] = counts.get(bits, 0) + 1
        size = sum(option.size for option in chosen)
        result.metrics["quantized_bytes"] = size
        result.metrics["weight_bits"] = 8 * size / weights if weights else 0.0
        shares = ", ".join(f"{count} layers at {bits} bits" for bits, count in sorted(counts.items()))
        result.notes.append(f"{shares}: {result.metrics['weight_bits']:.3f} bits per weight, scales included")
        self._parts = []
        return model, result

    def _round(self, block: Block, stage: Stage, wanted: set[Linear], part: _Part, dtype: torch.dtype) -> None:
        """Round the layers of a stage to every width; note the errors of their products, keep one width for a trial."""
        import torch

        from .numerics.hessian import Hessian

        chosen = tuple(product for product in stage if wanted.intersection(product.linears))
        hessians = {product: Hessian(product.in_features) for product in chosen}
        if chosen:
            block.collect(chosen, lambda product, rows: hessians[product].add(rows))
        for product in chosen:
            matrix = hessians.pop(product).matrix
            rounded = self._method(matrix, dtype)
            for linear in product.linears:
                if linear not in wanted:
                    continue
                part.linears.append(linear)
                weight = block.weight(linear)
                for bits in self.params.choices:
                    made = rounded(weight, self._grid(linear.name, bits)).dequantize(torch.float32)
                    difference = made - weight
                    error = float(((difference @ matrix) * difference).sum())
                    part.errors[bits] = part.errors.get(bits, 0.0) + max(error, 0.0)
                    if bits == self._trial_bits():
                        part.trial[linear] = made

    def _method(self, matrix: Tensor, dtype: torch.dtype) -> Callable[[Tensor, Grid], QuantizedWeight]:
        """Return how to round a weight as the pass that quantizes will, or nearly: with data GPTQ stands for all."""
        from .numerics.gptq import gptq
        from .numerics.grid import round_to_nearest
        from .numerics.hessian import factorize

        assert self._quantizer is not None
        clip = self._quantizer.params.clip == "mse"
        calibrated = Need.CALIBRATION in self._quantizer.needs
        factor = factorize(matrix.clone(), damping=0.01, act_order=True) if calibrated else None
        if factor is None:
            return lambda weight, grid: round_to_nearest(weight, grid, dtype, clip=clip)
        return lambda weight, grid: gptq(weight, factor, grid, dtype, clip=clip)[0]

    def _grid(self, name: str, bits: int) -> Grid:
        assert self._quantizer is not None, "prepare() found it"
        return self._quantizer.scheme(name, {name: bits})

    def _trial_bits(self) -> int:
        return min(self.params.choices, key=lambda bits: (abs(bits - _TRIAL_BITS), bits))

    def _budget(self, weights: int) -> float:
        """Return the budget in bytes, for that many weights."""
        found = _BUDGET.fullmatch(self.params.budget)
        assert found is not None, "check() has seen it"
        number, unit = float(found[1]), found[2]
        return number * weights / 8 if unit == "bpw" else number * _UNITS[unit]

    def _too_small(self, least: float, weights: int) -> UsageError:
        return UsageError(
            f"a budget of {self.params.budget} is too small",
            where=f"pass `{self.name}`: at {min(self.params.choices)} bits the quantized layers take "
            f"{8 * least / weights:.3f} bits per weight ({least / 2**20:.1f} MiB), scales included",
            hint="raise the budget, allow fewer bits among the choices, or use a larger group size",
        )


def _bytes(grid: Grid, linear: Linear | LinearFacts, scale_bits: int) -> float:
    bits = grid.bits_per_weight(linear.out_features, linear.in_features, scale_bits=scale_bits)
    return bits * linear.out_features * linear.in_features / 8
