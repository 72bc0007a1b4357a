"""Which rows a step learns from: a function of seed and step alone, so that a run can go on anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that are computed together.

    Attributes:
        rows: their numbers.
        ids: (batch, sequence) token ids, shorter rows filled with 0.
        mask: (batch, sequence) float32, 1 where a token is real.
        full: whether no row is shorter than another.
        labels: (batch,) the numbers of their labels; None where rows have none.
    """

    rows: list[int]
    ids: Tensor
    mask: Tensor
    full: bool
    labels: Tensor | None


class Order:
    """The order of rows: each epoch goes through all of them once, shuffled anew.

    Args:
        rows: all rows.
        at_once: rows that a process computes together.
        parts: batches that a process computes in a step.
        processes: how many processes share a step.
        process: the number of this one.
        seed: of the shuffling.
        labels: of the rows, None where they have none.

    Attributes:
        processes: as given.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        *,
        at_once: int,
        parts: int,
        processes: int,
        process: int,
        seed: int,
        labels: Sequence[int] | None = None,
    ) -> None:
        self._labels = labels
        self._rows, self._at_once, self._parts = rows, at_once, parts
        self.processes, self._process, self._seed = processes, process, seed
        self._permutation = lru_cache(2)(self._shuffled)

    @property
    def rows_in_step(self) -> int:
        """Rows that all processes together learn from in a step."""
        return self._at_once * self._parts * self.processes

    def chosen(self, step: int) -> list[int]:
        """Return the numbers of all rows of a step, counted from 0."""
        first = step * self.rows_in_step
        numbers = range(first, first + self.rows_in_step)
        return [self._permutation(number // len(self._rows))[number % len(self._rows)] for number in numbers]

    def batches(self, step: int) -> list[Batch]:
        """Return this process's batches of a step, part by part."""
        chosen, made = self.chosen(step), []
        for part in range(self._parts):
            # A process's share lies beside the others' in each part: two processes of n rows do what one of 2n does.
            start = (part * self.processes + self._process) * self._at_once
            made.append(batch_of(self._rows, chosen[start : start + self._at_once], self._labels))
        return made

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return torch.randperm(len(self._rows), generator=generator).tolist()


def batch_of(rows: Sequence[Sequence[int]], numbers: list[int], labels: Sequence[int] | None = None) -> Batch:
    """Return the rows called `numbers` as one batch, with their labels where rows have some."""
    chosen = [rows[number] for number in numbers]
    longest = max(map(len, chosen))
    ids, mask = torch.zeros(len(chosen), longest, dtype=torch.long), torch.zeros(len(chosen), longest)
    for index, row in enumerate(chosen):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1.0
    own = None if labels is None else torch.tensor([labels[number] for number in numbers])
    return Batch(numbers, ids, mask, full=all(len(row) == longest for row in chosen), labels=own)


@dataclass(frozen=True, slots=True)
class Counts:
    """How many units a sum of losses is divided by.

    Attributes:
        tokens: real tokens.
        predicted: real tokens that have one before them.
        texts: rows.
        answers: real tokens from that on which the row's label names; 0 where rows have none.
    """

    tokens: int
    predicted: int
    texts: int
    answers: int

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], numbers: Sequence[int], labels: Sequence[int] | None = None) -> Counts:
        """Count the rows called `numbers`."""
        lengths = [len(rows[number]) for number in numbers]
        answers = 0 if labels is None else sum(lengths) - sum(labels[number] for number in numbers)
        return cls(sum(lengths), sum(lengths) - len(lengths), len(lengths), answers)
