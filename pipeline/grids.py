"""Which layer goes on which grid, as far as it is known before the work: overrides give layers grids of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from ..core.activations import ActivationGrid, ActivationNumber
from ..core.errors import UsageError
from ..core.facts import LinearFacts, ModelFacts
from ..core.passes import AllocationPass, Need
from ..core.quantized import Grid
from .steps import AnyExporter, AnyPass, kept_adapter


def layers_by_grid(passes: Sequence[AnyPass], facts: ModelFacts) -> dict[Grid, list[LinearFacts]]:
    """Return the layers that passes put on a grid, by grid.

    Where a pass chooses the bits while it works, a layer stands under each grid that may be chosen.
    """
    survey = _survey(passes)
    found: dict[Grid, list[LinearFacts]] = {}
    for linear in facts.linears:
        own = next((grid for one in passes if (grid := one.grid_for(linear.name)) is not None), None)
        grids: Iterable[Grid] = () if own is None else (own,)
        for grid in grids if survey is None else survey.candidates(linear.name):
            found.setdefault(grid, []).append(linear)
    return found


def check_exports(exporters: Sequence[AnyExporter], passes: Sequence[AnyPass], facts: ModelFacts) -> None:
    """Ask every exporter whether it can hold every grid, with the layers that are put on it, and an adapter.

    Raises:
        UsageError: one cannot.
    """
    by_grid = layers_by_grid(passes, facts)
    survey = _survey(passes)
    for exporter in exporters:
        if not by_grid:
            exporter.check(facts, None)
        if kept_adapter(passes) is not None:
            exporter.check_adapter()
        exporter.check_grids(by_grid)
        exporter.check_activations(by_grid, input_grid(passes), cache_number(passes))
        for grid, linears in by_grid.items():
            try:
                exporter.check(msgspec.structs.replace(facts, linears=tuple(linears)), grid)
            except UsageError as error:
                if survey is None:
                    raise
                where = f"{error.where}\n" if error.where else ""
                raise UsageError(
                    error.what,
                    where=f"{where}pass `{survey.name}` may choose {grid}",
                    hint=f"leave {grid.bits} out of its choices, or {error.hint}",
                ) from None


def input_grid(passes: Sequence[AnyPass]) -> ActivationGrid | None:
    """Return how the passes make inputs of layers be rounded, None when none does."""
    return next((grid for one in passes if (grid := one.input_grid()) is not None), None)


def cache_number(passes: Sequence[AnyPass]) -> ActivationNumber | None:
    """Return what the passes make keys and values be rounded to, None when none does."""
    return next((number for one in passes if (number := one.cache_number()) is not None), None)


def packed_bytes(
    passes: Sequence[AnyPass], facts: ModelFacts, *, scale_bits: int, containers: Sequence[int] | None = None
) -> float:
    """Estimate the bytes of all quantized layers, codes and scales.

    Args:
        passes: the passes.
        facts: the outline.
        scale_bits: bits of a scale.
        containers: the widths that the format has, rising; None when it has every one.
    """
    survey = _survey(passes)
    if survey is not None:
        return survey.weight_bytes(facts)
    total = 0.0
    for grid, linears in layers_by_grid(passes, facts).items():
        held = grid.bits if containers is None else next(bits for bits in containers if bits >= grid.bits)
        stored = msgspec.structs.replace(grid, bits=held)
        for linear in linears:
            bits = stored.bits_per_weight(linear.out_features, linear.in_features, scale_bits=scale_bits)
            total += bits * linear.out_features * linear.in_features / 8
    return total


def adapter_bytes(passes: Sequence[AnyPass], facts: ModelFacts) -> int:
    """Estimate the bytes of the adapter, in float32, that the passes leave beside the weights, 0 for none."""
    kept = kept_adapter(passes)
    if kept is None:
        return 0
    keeper, shape = kept
    layers = quantized_layers(passes, facts) if Need.UNROUNDED in keeper.requires() else facts.linears
    return sum(4 * shape.rank * (one.in_features + one.out_features) for one in layers if shape.covers(one.name))


def quantized_layers(passes: Sequence[AnyPass], facts: ModelFacts) -> list[LinearFacts]:
    """Return the layers that some pass puts on a grid."""
    return [linear for linear in facts.linears if any(one.grid_for(linear.name) is not None for one in passes)]


def _survey(passes: Sequence[AnyPass]) -> AllocationPass[Any] | None:
    return next((one for one in passes if isinstance(one, AllocationPass)), None)
