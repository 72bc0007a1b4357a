"""What text a pass reads beside the calibration samples. `pipeline/` gets it from `calibration/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Labels:
    """What a row of data says of its text.

    Attributes:
        column: the column that says it.
        classes: names of the classes, by their number; None where the column holds an answer that continues the text.
    """

    column: str
    classes: tuple[str, ...] | None


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
        labels: what is read beside each text, which then is one row.
    """

    data: str | None
    column: str | None
    length: int
    packing: bool
    rows: int
    held_out: int
    labels: Labels | None = None


@dataclass(frozen=True, slots=True)
class TextRows:
    """Rows of token ids, read from disk as they are asked for.

    Attributes:
        rows: to learn from.
        held_out: to measure with; none of `rows`.
        source: the data, as the user named it.
        sha256: digest of all token ids, and labels.
        labels: of each of `rows` the number of its class, or of the token with which its answer begins; None where
            none were asked for.
        held_out_labels: the same of `held_out`.
    """

    rows: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]
    source: str
    sha256: str
    labels: Sequence[int] | None = None
    held_out_labels: Sequence[int] | None = None
