"""Plots as inline SVG, drawn for a width of 380: text stays readable on a phone, on a desk they stand side by side.

Colours are classes, which the page's style sheet gives for light and dark. Every plot has a title and a description,
and says with text or shape what it says with colour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...core.numbers import number, share
from .axes import Axis, axis
from .document import LayerMap, Point
from .markup import Markup, element, joined

WIDTH = 380
_LINE = 14
_CHARACTER = 6.2
_STEPS = 9
"""Shades of a heat map."""

_IN_BAND = 80
"""Blocks beside each other in a heat map; more stand in further bands below."""


def figure(title: str, describe: str, height: float, *children: Markup) -> Markup:
    """Return an SVG of that height with a title and a description."""
    return element(
        "svg",
        element("title", title),
        element("desc", describe),
        *children,
        viewBox=f"0 0 {WIDTH} {number(height).replace(',', '')}",
        role="img",
        aria_label=f"{title}. {describe}",
    )


def text(x: float, y: float, content: str, *, class_: str | None = None, anchor: str | None = None) -> Markup:
    """Return text whose base line begins (or by `anchor` ends, or has its middle) at a point."""
    return element("text", content, x=float(x), y=float(y), class_=class_, text_anchor=anchor)


def short_names(names: Sequence[str]) -> list[str]:
    """Return the shortest endings, cut at dots, that tell names apart."""
    short: list[str] = []
    for name in names:
        parts = name.split(".")
        endings = [".".join(parts[at:]) for at in range(len(parts) - 1, -1, -1)]
        others = [other for other in names if other != name]
        short.append(
            next((one for one in endings if not any(f".{other}".endswith(f".{one}") for other in others)), name)
        )
    return short


def clipped(name: str, length: int) -> str:
    """Return a name of at most `length` characters, its middle left out."""
    if len(name) <= length:
        return name
    tail = (length - 1) * 2 // 3
    return f"{name[: length - 1 - tail]}…{name[-tail:]}"


def heat_map(layers: LayerMap) -> Markup:
    """Return a map with a column for each block and a row for each kind of product, darker where more is lost."""
    is_bits = layers.figure == "bits"
    title = "Bits of each layer" if is_bits else "Relative error of each rounded weight"
    write = number if is_bits else share
    left, top, height = 104, 22, 16
    names = short_names(layers.kinds)
    shown: list[Markup] = []
    y = float(top)
    for start in range(0, len(layers.blocks), _IN_BAND):
        blocks, cells = layers.blocks[start : start + _IN_BAND], layers.cells[start : start + _IN_BAND]
        width = min(26.0, (WIDTH - left - 2) / min(len(layers.blocks), _IN_BAND))
        shown += _block_numbers(blocks, left, y - 6, width)
        for row, name in enumerate(names):
            label = element("text", element("title", layers.kinds[row]), clipped(name, 16), x=left - 6, y=y + 12)
            shown.append(element("g", label, text_anchor="end"))
            for column, figures in enumerate(cells):
                value = figures[row]
                if value is None:
                    continue
                at = {"x": left + column * width, "y": y, "width": max(width - (1 if width > 3 else 0), 0.5)}
                shade = f"h{_shade(value, layers.low, layers.high)}"
                told = element("title", f"{layers.stack}.{blocks[column]}.{layers.kinds[row]}: {write(value)}")
                shown.append(element("rect", told, class_=shade, height=height - 1, **at))
                if is_bits and width >= 9:
                    middle = left + column * width + width / 2
                    shown.append(text(middle, y + 12, write(value), class_=f"{shade}t", anchor="middle"))
            y += height
        y += 24
    shown.append(_shades(layers, y - 10, write))
    said = f"{layers.stack}: from {write(layers.low)} to {write(layers.high)}, the highest in {layers.highest}."
    return figure(title, f"{said} The table below has every value.", y + 14, *shown)


def _block_numbers(blocks: Sequence[int], left: float, y: float, width: float) -> list[Markup]:
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100) if step * width >= 22)
    return [
        text(left + at * width + width / 2, y, str(block), class_="tick", anchor="middle")
        for at, block in enumerate(blocks)
        if at % every == 0
    ]


def _shades(layers: LayerMap, y: float, write: Callable[[float], str]) -> Markup:
    """Return what shades mean: a bar from the lowest value to the highest."""
    left, width = 104, 16
    low, high = write(layers.low), write(layers.high)
    if layers.low == layers.high:
        return text(left, y + 9, f"all {low}")
    bar = [element("rect", x=left + width * at, y=y, width=width, height=10, class_=f"h{at}") for at in range(_STEPS)]
    return joined(text(left - 6, y + 9, low, anchor="end"), *bar, text(left + width * _STEPS + 6, y + 9, high))


def _shade(value: float, low: float, high: float) -> int:
    return min(_STEPS - 1, int((value - low) / (high - low) * _STEPS)) if high > low else 2


def curve(name: str, unit: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> Markup:
    """Return lines over steps, each named at its end.

    Args:
        name: what is measured.
        unit: of it.
        series: (step, value) points by name; the last is drawn as the one that counts.
    """
    left, right, top, bottom = 46, WIDTH - 74, 24, 168
    points = [point for line in series.values() for point in line]
    across = axis((step for step, _ in points), left, right)
    up = axis((value for _, value in points), bottom, top)
    shown = [_frame(across, up, "step", f"{name}, {unit}")]
    ends = _apart([up.at(line[-1][1]) for line in series.values()], _LINE, top, bottom)
    for at, (label, line) in enumerate(series.items()):
        main = at == len(series) - 1
        places = [(across.at(step), up.at(value)) for step, value in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        shown.append(element("polyline", points=path, class_="line main" if main else "line"))
        if main:
            shown += [element("circle", cx=x, cy=y, r=2.5, class_="dot") for x, y in places]
        shown.append(text(right + 6, ends[at] + 4, label, class_="label main" if main else "label"))
    told = "; ".join(f"{label} from {number(line[0][1])} to {number(line[-1][1])}" for label, line in series.items())
    return figure(f"{name} while it learnt", f"{told}.", 206, *shown)


@dataclass(frozen=True, slots=True)
class Measure:
    """What an axis shows: its name with the unit, and how to get it of a point; None where it was not measured."""

    name: str
    of: Callable[[Point], float | None]

    def value(self, point: Point) -> float:
        """Return it of a point that has it."""
        found = self.of(point)
        assert found is not None, "only points that have it are drawn"
        return found


def scatter(title: str, points: Sequence[Point], across: Measure, up: Measure) -> Markup:
    """Return points with their names beside them; a source model is a ring, an artifact a dot.

    Quality is drawn with its interval where that is known and it is what the vertical axis shows.

    Args:
        title: what is shown.
        points: at least one, all with both figures.
        across: the horizontal axis.
        up: the vertical one.
    """
    left, right, top, bottom = 46, WIDTH - 12, 24, 208
    ordered = sorted(points, key=up.value)
    spans = {point: _span(point, up) for point in ordered}
    ends = [end for span in spans.values() for end in span]
    xs = axis(map(across.value, ordered), left, right, zero=True)
    ys = axis([*map(up.value, ordered), *ends], bottom, top)
    shown = [_frame(xs, ys, across.name, up.name)]
    places = [(xs.at(across.value(point)), ys.at(up.value(point))) for point in ordered]
    rows = _apart([y for _, y in places], _LINE, top, bottom)
    for point, (x, y), row in zip(ordered, places, rows, strict=True):
        if spans[point]:
            low, high = map(ys.at, spans[point])
            shown.append(element("line", x1=x, x2=x, y1=low, y2=high, class_="whisker"))
        shown.append(element("circle", cx=x, cy=y, r=4.5, class_="ring" if point.is_source else "dot"))
        shown.append(_name(point.name, (x, y), row, places, (left, right)))
    told = "; ".join(
        f"{point.name}: {number(across.value(point))} by {number(up.value(point))}"
        + (" (source)" if point.is_source else "")
        for point in ordered
    )
    return figure(title, f"{across.name} by {up.name}. {told}.", 246, *shown)


def _span(point: Point, up: Measure) -> tuple[float, ...]:
    known = point.quality_low is not None and point.quality_high is not None
    shown = up.of(point) is not None and up.of(point) == point.quality
    return (point.quality_low, point.quality_high) if known and shown else ()  # type: ignore[return-value]


def _name(
    name: str,
    place: tuple[float, float],
    row: float,
    points: Sequence[tuple[float, float]],
    edges: tuple[float, float],
) -> Markup:
    """Return a point's name beside it, on the side where it covers no other point, with a line to it if it moved."""
    x, y = place
    short = clipped(name, 26)
    width = _CHARACTER * len(short)

    def free(start: float) -> bool:
        end = start + width
        covered = any(start - 4 < other < end + 4 and abs(row - at) < _LINE - 2 for other, at in points)
        return edges[0] <= start and end <= edges[1] + 8 and not covered

    after = free(x + 11) or (not free(x - 11 - width) and x < sum(edges) / 2)
    tip = x + (9 if after else -9)
    leader = element("line", x1=x, y1=y, x2=tip, y2=row, class_="leader") if abs(row - y) > 2 else None
    label = element("text", element("title", name), short, x=tip + (2 if after else -2), y=row + 4)
    return joined(leader, element("g", label, class_="label", text_anchor="start" if after else "end"))


def interval(value: float, low: float, high: float, limit: float, told: str) -> Markup:
    """Return a figure with its interval and the limit that it is held against, on one line."""
    xs = axis((value, low, high, limit), 8, WIDTH - 8)
    y = 14
    return figure(
        "Interval and limit",
        told,
        28,
        element("line", x1=8, x2=WIDTH - 8, y1=y, y2=y, class_="grid"),
        element("line", x1=xs.at(low), x2=xs.at(high), y1=y, y2=y, class_="whisker wide"),
        element("circle", cx=xs.at(value), cy=y, r=5, class_="dot"),
        element("line", x1=xs.at(limit), x2=xs.at(limit), y1=2, y2=26, class_="limit"),
    )


def _frame(across: Axis, up: Axis, below: str, above: str) -> Markup:
    """Return the axes with their ticks and names."""
    shown = [text(4, 12, above, class_="axis")]
    for value in up.ticks:
        y = up.at(value)
        shown.append(element("line", x1=across.start, x2=across.stop, y1=y, y2=y, class_="grid"))
        shown.append(text(across.start - 5, y + 3.5, _tick(value), class_="tick", anchor="end"))
    shown += [
        text(across.at(value), up.start + 15, _tick(value), class_="tick", anchor="middle") for value in across.ticks
    ]
    shown.append(text(across.stop, up.start + 31, below, class_="axis", anchor="end"))
    return joined(*shown)


def _tick(value: float) -> str:
    return number(float(f"{value:.6g}"))


def _apart(places: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Return places moved so that neighbours stand `least` apart, between `low` and `high` as far as there is room."""
    order = sorted(range(len(places)), key=lambda at: places[at])
    moved = list(places)
    before = low - least
    for at in order:
        moved[at] = before = max(places[at], before + least)
    over = max(0.0, before - high)
    if over:
        after = high + least
        for at in reversed(order):
            moved[at] = after = min(moved[at], after - least)
    return moved
