"""What `llmopt infer` computes of a file: which rows, and what an artifact makes of a window of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import msgspec

from ..calibration.source import Source
from ..core.errors import UsageError
from ..core.progress import Reporter, Step
from ..core.runtime import Session
from ..models.outline import has_tokenizer
from ..models.text import load_tokenizer
from .batching import BatchingParams
from .journal import Totals

T = TypeVar("T")


class Each(Protocol):
    """What `map` does, and a pool's own."""

    def __call__(self, function: Callable[[Any], T], batches: Sequence[Any], /) -> Iterator[T]:
        """Yield what `function` returns of each batch, in order."""
        ...


ALONE = 32
"""Rows of a window where each takes long: what an interrupted run loses."""


@dataclass(frozen=True, slots=True)
class InferOptions:
    """How to compute.

    Attributes:
        column: holds the text, or the path of the sound.
        pair_column: holds the second text of a pair.
        batching: which texts are computed together; None stands for the defaults.
        max_length: tokens kept of a text; as many as the model takes when None.
        max_new_tokens: tokens to generate, where text is generated.
        threads: threads to compute with, all cores when None.
        parallel: batches computed at the same time; as many as pay when None.
    """

    column: str | None = None
    pair_column: str | None = None
    batching: BatchingParams | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    threads: int | None = None
    parallel: int | None = None


class Inference:
    """A file, and what a model makes of its rows.

    Attributes:
        source: the file.
        title: what is computed.
        window: rows that are computed before they are written down.
        parallel: whether batches may be computed at the same time.
        each: calls a function with each batch, some at the same time, and gives what it returns in their order.
    """

    rows: ClassVar[str]
    """What the rows are."""

    source: Source
    title: str
    window: int
    parallel: bool = True

    def __init__(self) -> None:
        self.each: Each = map
        self._latencies: list[float] = []

    def count(self) -> int:
        """Read the whole file: what is wrong with it is found before anything is computed.

        Raises:
            LlmoptError: a row cannot be used.
        """
        raise NotImplementedError

    def files(self) -> Iterator[Path]:
        """Yield the files that are read: the one with the rows, then those that they name."""
        assert self.source.path is not None
        yield self.source.path

    def read(self) -> Iterator[Any]:
        """Yield what is computed of, row by row."""
        raise NotImplementedError

    def compute(
        self, session: Session, window: Sequence[Any], totals: Totals, step: Step
    ) -> tuple[list[bytes], Totals]:
        """Compute a window.

        Args:
            session: the artifact, opened.
            window: from `read`.
            totals: of all windows before it.
            step: told of every row.

        Returns:
            A line for each row, and the totals with this window.
        """
        raise NotImplementedError

    def report(self, totals: Totals, before: Totals, seconds: float) -> dict[str, Any]:
        """Return the figures.

        Args:
            totals: of the whole file.
            before: of what an earlier run had finished.
            seconds: that this run took.
        """
        raise NotImplementedError

    def tell(self, totals: Totals, reporter: Reporter) -> None:
        """Say what the user should know of the rows."""

    def _timed(self, compute: Callable[[], T]) -> T:
        begun = time.perf_counter()
        made = compute()
        self._latencies.append(time.perf_counter() - begun)
        return made

    def _percentiles(self) -> tuple[float, float]:
        """Return the median and the 95th percentile of what took its time."""
        import numpy as np

        middle, high = np.percentile(self._latencies, [50, 95]) if self._latencies else (0.0, 0.0)
        return float(middle), float(high)


def tokenizer_of(directory: Path) -> Any:
    """Return an artifact's tokenizer.

    Raises:
        UsageError: there is none.
    """
    if not has_tokenizer(directory):
        raise UsageError(
            f"`{directory}` has no tokenizer",
            where="texts are read and written with the model's own",
            hint="put tokenizer.json and tokenizer_config.json beside the graph",
        )
    return load_tokenizer(directory)


def line(index: int, row: dict[str, Any]) -> bytes:
    """Return a row of results as it is written."""
    return msgspec.json.encode({"index": index, **row})
