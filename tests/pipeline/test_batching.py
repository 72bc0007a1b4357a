"""Batches: every text in exactly one, limits kept, and dp the cheapest."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmopt.core.errors import UsageError
from llmopt.pipeline.batching import (
    BatchingParams,
    CostTable,
    by_cost,
    by_length,
    by_tokens,
    fixed,
    grid_of,
    padded_tokens,
)

LENGTHS = st.lists(st.integers(1, 300), max_size=60)
SIZES = st.integers(1, 12)


def cost_of(batches, lengths, cost):
    return sum(cost(max(lengths[i] for i in batch), len(batch), sum(lengths[i] for i in batch)) for batch in batches)


@st.composite
def costs(draw):
    """A cost that grows with length and size: a start, the padded tokens, and attention."""
    start, token, attention = (draw(st.floats(0, 50)) for _ in range(3))
    return lambda longest, count, _: start + count * longest * (token + attention * longest / 100)


@pytest.mark.parametrize("batching", ["fixed", "sorted", "tokens", "dp"])
@given(lengths=LENGTHS, size=SIZES, budget=st.integers(1, 900))
def test_every_text_is_in_one_batch(batching, lengths, size, budget):
    params = BatchingParams(
        batching=batching, batch_size=size, max_batch_tokens=budget if batching in {"tokens", "dp"} else None
    )
    batches = params.make(lengths, lambda longest, count, _: 1 + longest * count)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= size for batch in batches)
    if batching in {"tokens", "dp"}:
        assert all(len(batch) == 1 or padded_tokens([batch], lengths) <= budget for batch in batches)


@given(lengths=LENGTHS, budget=st.integers(1, 900))
def test_tokens_fills_its_budget(lengths, budget):
    """The first text of a batch would not have fitted into the batch before it."""
    batches = by_tokens(lengths, budget)
    for before, batch in pairwise(batches):
        assert (len(before) + 1) * lengths[batch[0]] > budget


def partitions(count, size):
    """All ways to cut 0..count into consecutive batches of at most `size`."""
    if count == 0:
        yield []
    for last in range(1, min(size, count) + 1):
        for rest in partitions(count - last, size):
            yield [*rest, list(range(count - last, count))]


@given(lengths=st.lists(st.integers(1, 300), max_size=10), size=SIZES, cost=costs(), fill=st.floats(0, 1))
def test_dp_is_the_cheapest_of_all_ways_to_cut(lengths, size, cost, fill):
    lengths = sorted(lengths)

    def by_fill(longest, count, tokens):
        return cost(longest, count, tokens) * (1 - fill * (1 - tokens / (longest * count)))

    found = cost_of(by_cost(lengths, by_fill, size), lengths, by_fill)
    least = min(cost_of(way, lengths, by_fill) for way in partitions(len(lengths), size))
    assert found == pytest.approx(least)


@given(lengths=LENGTHS, size=SIZES, cost=costs())
def test_dp_never_costs_more_than_batches_of_one_size(lengths, size, cost):
    found = cost_of(by_cost(lengths, cost, size), lengths, cost)
    for other in (fixed(lengths, size), by_length(lengths, size)):
        assert found <= cost_of(other, lengths, cost) * (1 + 1e-9)


def test_dp_takes_what_the_machine_likes():
    """Where every batch costs the same, all together; where only padding costs, each length alone."""
    lengths = [9, 3, 9, 3, 50]
    assert len(by_cost(lengths, lambda *_: 1.0, 8)) == 1
    apart = by_cost(lengths, lambda longest, count, tokens: longest * count - tokens + 0.001, 8)
    assert sorted(map(sorted, apart)) == [[0, 2], [1, 3], [4]]


def test_fixed_and_sorted():
    lengths = [5, 1, 4, 2, 3]
    assert fixed(lengths, 2) == [[0, 1], [2, 3], [4]]
    assert by_length(lengths, 2) == [[1, 3], [4, 2], [0]]
    assert padded_tokens(fixed(lengths, 2), lengths) == 10 + 8 + 3


@pytest.mark.parametrize("batching", ["fixed", "sorted"])
def test_a_limit_that_does_not_apply_is_refused(batching):
    with pytest.raises(UsageError, match="--max-batch-tokens"):
        BatchingParams(batching=batching, max_batch_tokens=9).check()


def test_the_table_between_and_beyond_what_was_measured():
    table = CostTable({(8, 1): 1.0, (8, 4): 4.0, (16, 1): 3.0, (16, 4): 8.0})
    assert table(8, 1, 8) == 1.0
    assert table(12, 1, 12) == 2.0
    assert table(8, 3, 24) == pytest.approx(3.0)
    assert table(4, 1, 4) == 1.0  # shorter than the shortest: as that
    assert table(16, 8, 128) == 16.0
    assert table(32, 4, 128) == 16.0


def test_what_was_not_measured_is_extrapolated():
    table = CostTable({(8, 1): 1.0, (8, 4): 4.0, (16, 1): 3.0})
    assert table(16, 4, 64) == 12.0


def test_noise_never_makes_a_larger_batch_cheaper():
    table = CostTable({(8, 1): 2.0, (8, 4): 1.5, (16, 1): 1.0, (16, 4): 5.0})
    assert table(8, 4, 32) == table(16, 1, 16) == 2.0


@given(fill=st.integers(1, 64))
def test_a_graph_without_padding_costs_its_tokens(fill):
    measured = {(8, 1): 1.0, (8, 8): 8.0}
    assert CostTable(measured)(8, 8, fill) == 8.0
    assert CostTable(measured, by_fill=1.0)(8, 8, fill) == pytest.approx(8.0 * fill / 64)


@given(most=st.integers(1, 600), first=st.integers(1, 20), factor=st.integers(2, 5))
def test_the_places_to_measure_reach_the_largest(most, first, factor):
    places = grid_of(most, first=first, factor=factor)
    assert places[-1] == most
    assert places == sorted(set(places))
