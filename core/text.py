"""What text a pass reads beside the calibration samples. `pipeline/` gets it from `calibration/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextRequest:
    """Text that a pass wants as rows of token ids.

    Attributes:
        data: a file, or `hf:NAME[/CONFIG][:SPLIT]`; None for the data that the recipe calibrates on.
        column: the column that holds the text.
        length: tokens in a row at most.
        packing: pack texts into full rows; otherwise one text is one row, cut at `length`.
        rows: how many rows are of use; reading stops there.
        held_out: further rows to measure with; no more than a tenth of what there is.
    """

    data: str | None
    column: str | None
    length: int
    packing: bool
    rows: int
    held_out: int


@dataclass(frozen=True, slots=True)
class TextRows:
    """Rows of token ids, read from disk as they are asked for.

    Attributes:
        rows: to learn from.
        held_out: to measure with; none of `rows`.
        source: the data, as the user named it.
        sha256: digest of all token ids.
    """

    rows: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]
    source: str
    sha256: str
