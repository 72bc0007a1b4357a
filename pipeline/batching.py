"""Putting texts of different lengths into batches: which texts are computed together. Pure, and nothing heavy.

A batch is padded to its longest text, so texts of like length belong together. How many of them is a matter of the
machine: `dp` finds the cheapest way under a table of measured costs (Fang, Yu, Zhao and Zhou 2021,
"TurboTransformers").

All functions return batches of places in the list of lengths; every place is in exactly one of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Annotated, Literal

from msgspec import Meta

from ..core.errors import UsageError
from ..core.params import Params

Batches = list[list[int]]
Cost = Callable[[int, int, int], float]
"""Seconds that a batch takes, by the length of its longest text, the number of its texts, and their tokens."""

SIZE = 32
BUDGET = 1024


class BatchingParams(Params, frozen=True, kw_only=True):
    """How texts are put into batches."""

    batching: Annotated[
        Literal["fixed", "sorted", "tokens", "dp"],
        Meta(
            description="Which texts are computed together. fixed: as they come. sorted: of like length. tokens: of "
            "like length, up to --max-batch-tokens. dp: the cheapest way by costs measured first, for a second or two."
        ),
    ] = "tokens"
    batch_size: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="The most texts in a batch; 32 when left out, with tokens any number."),
    ] = None
    max_batch_tokens: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(
            description="The most tokens in a batch, padding included; a longer text goes alone. With tokens 1024 when "
            "left out, with dp any number."
        ),
    ] = None

    def check(self) -> None:
        """Refuse what does not go together.

        Raises:
            UsageError: a limit on tokens where batches are counted in texts.
        """
        if self.max_batch_tokens is not None and self.batching in {"fixed", "sorted"}:
            raise UsageError(
                f"--max-batch-tokens does not apply to --batching {self.batching}",
                where="its batches are counted in texts, with --batch-size",
                hint="it belongs to --batching tokens or --batching dp",
            )

    def make(self, lengths: Sequence[int], cost: Cost | None) -> Batches:
        """Return batches of texts that are `lengths` tokens long; `dp` needs the cost of a batch."""
        size = self.batch_size or SIZE
        if self.batching == "fixed":
            return fixed(lengths, size)
        if self.batching == "sorted":
            return by_length(lengths, size)
        if self.batching == "tokens":
            return by_tokens(lengths, self.max_batch_tokens or BUDGET, self.batch_size)
        assert cost is not None
        return by_cost(lengths, cost, size, self.max_batch_tokens)


def fixed(lengths: Sequence[int], size: int) -> Batches:
    """Take texts as they come, `size` at a time."""
    return _cut(list(range(len(lengths))), size)


def by_length(lengths: Sequence[int], size: int) -> Batches:
    """Take texts by their length, `size` at a time."""
    return _cut(_sorted(lengths), size)


def by_tokens(lengths: Sequence[int], budget: int, size: int | None = None) -> Batches:
    """Take texts by their length, as many as keep a padded batch within `budget` tokens.

    Args:
        lengths: tokens of each text.
        budget: tokens of a padded batch; a text longer than that has a batch of its own.
        size: the most texts in a batch, any number when None.
    """
    batches: Batches = []
    for place in _sorted(lengths):
        # The texts come shortest first, so each is the longest of the batch it joins.
        room = batches and (len(batches[-1]) + 1) * lengths[place] <= budget
        if room and (size is None or len(batches[-1]) < size):
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def by_cost(lengths: Sequence[int], cost: Cost, size: int, budget: int | None = None) -> Batches:
    """Cut the texts, sorted by length, where the cost of all batches together is least.

    The cheapest way to cut the first n texts is a last batch and the cheapest way to cut those before it, so n * size
    batches are looked at. Where a longer or larger batch never costs less, no other order is cheaper than this one.

    Args:
        lengths: tokens of each text.
        cost: of a batch.
        size: the most texts in a batch.
        budget: the most tokens in a padded batch, any number when None.
    """
    order = _sorted(lengths)
    tokens = [0, *accumulate(lengths[place] for place in order)]
    least = [0.0]
    begins: list[int] = []
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        found, begin = float("inf"), end - 1
        for start in range(end - 1, max(0, end - size) - 1, -1):
            if budget is not None and start < end - 1 and (end - start) * longest > budget:
                break
            whole = least[start] + cost(longest, end - start, tokens[end] - tokens[start])
            if whole < found:
                found, begin = whole, start
        least.append(found)
        begins.append(begin)
    batches: Batches = []
    end = len(order)
    while end:
        batches.append(order[begins[end - 1] : end])
        end = begins[end - 1]
    return batches[::-1]


def padded_tokens(batches: Batches, lengths: Sequence[int]) -> int:
    """Return the tokens of all batches, padding included."""
    return sum(len(batch) * max(lengths[place] for place in batch) for batch in batches)


def _sorted(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lengths.__getitem__)


def _cut(order: list[int], size: int) -> Batches:
    return [order[start : start + size] for start in range(0, len(order), size)]


class CostTable:
    """Seconds of a batch, between and beyond those that were measured.

    Between two lengths and two sizes the cost is taken for a straight line; beyond the last measured of either, for
    proportional to it. A larger batch is never taken to cost less than a smaller one: that would be noise.

    Args:
        seconds: by length and number of texts; some may be missing, but none of the smallest length or size.
        by_fill: how far a batch costs its tokens rather than its padded tokens: 0 where padding is computed like text,
            1 where a graph leaves it out.
    """

    def __init__(self, seconds: dict[tuple[int, int], float], by_fill: float = 0.0) -> None:
        self.by_fill = by_fill
        self._lengths = sorted({length for length, _ in seconds})
        self._sizes = sorted({size for _, size in seconds})
        self._grid: dict[int, list[float]] = {}
        above = [0.0] * len(self._sizes)
        for length in self._lengths:
            line: list[float] = []
            for at, size in enumerate(self._sizes):
                measured = seconds.get((length, size))
                if measured is None:  # as much more than the next smaller one as it has more texts
                    measured = line[-1] * size / self._sizes[at - 1]
                line.append(max(measured, above[at], line[-1] if line else 0.0))
            self._grid[length] = above = line
        self._lines: dict[int, dict[int, float]] = {}

    def __call__(self, longest: int, count: int, tokens: int) -> float:
        """Return the seconds of a batch; see `Cost`."""
        line = self._lines.setdefault(longest, {})
        full = line.get(count)
        if full is None:
            full = line[count] = self._full(longest, count)
        fill = tokens / max(1, longest * count)
        return full * (1 - self.by_fill * (1 - fill))

    def _full(self, longest: int, count: int) -> float:
        columns = [_between(self._sizes, self._grid[length], count) for length in self._lengths]
        return _between(self._lengths, columns, longest)


def _between(places: Sequence[int], values: Sequence[float], at: int) -> float:
    """Return the value at a place, on the straight line between its neighbours; proportional beyond the last."""
    if at >= places[-1]:
        return values[-1] * at / places[-1]
    right = bisect_left(places, at)
    if right == 0:
        return values[0]
    share = (at - places[right - 1]) / (places[right] - places[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])


def grid_of(most: int, *, first: int = 1, factor: int = 2) -> list[int]:
    """Return places to measure at: `first`, then each `factor` times the one before, and `most` itself."""
    places = [first]
    while places[-1] * factor < most:
        places.append(places[-1] * factor)
    return [*places, most] if most > places[-1] else [min(first, most)] if most < first else places
