"""Figures of single layers, laid out by block and kind of product."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..core.manifest import PassRecord
from ..evaluation.report.document import LayerMap

_PLACE = re.compile(r"(?P<stack>.*?[A-Za-z_]\w*)\.(?P<block>\d+)\.(?P<kind>.+)")
_Figures = Mapping[str, Mapping[str, float]]


def rounded_layers(records: Sequence[PassRecord]) -> dict[str, dict[str, float]]:
    """Return the figures of every layer that was rounded, as the last pass that rounded it left it."""
    layers: dict[str, dict[str, float]] = {}
    for record in records:
        layers |= {name: figures for name, figures in record.layers.items() if "bits" in figures}
    return layers


def layer_maps(layers: _Figures) -> list[LayerMap]:
    """Return a map of the errors and one of the bits for each stack of blocks."""
    stacks: dict[str, dict[tuple[int, str], list[str]]] = {}
    for name in layers:
        if match := _PLACE.fullmatch(name):
            # Experts are one kind, and so are the sublayers of a block that only numbers tell apart.
            kind = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", match["kind"])
            stacks.setdefault(match["stack"], {}).setdefault((int(match["block"]), kind), []).append(name)
    return [
        made
        for figure in ("relative_error", "bits")
        for stack, places in stacks.items()
        if (made := _map(figure, stack, places, layers)) is not None
    ]


def _map(figure: str, stack: str, places: Mapping[tuple[int, str], list[str]], layers: _Figures) -> LayerMap | None:
    values: dict[tuple[int, str], tuple[float, str]] = {}
    for place, names in places.items():
        known = [(layers[name][figure], name) for name in names if figure in layers[name]]
        if known:
            values[place] = max(known, key=lambda item: item[0])
    if not values:
        return None
    blocks = sorted({block for block, _ in places})
    kinds = list(dict.fromkeys(kind for _, kind in places))
    cells = [[values[block, kind][0] if (block, kind) in values else None for kind in kinds] for block in blocks]
    highest = max(values.values(), key=lambda item: item[0])
    return LayerMap(
        figure=figure,
        stack=stack,
        blocks=blocks,
        kinds=kinds,
        cells=cells,
        low=min(value for value, _ in values.values()),
        high=highest[0],
        highest=highest[1],
    )
