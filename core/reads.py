"""What a run reads, as data."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

Role = Literal["recipe", "model", "teacher", "adapter", "text", "calibration", "evaluation"]
"""What a file is read for; `text` is what a pass learns from."""


class Input(NamedTuple):
    """What a pass reads beside the model and the samples, by the name that its parameters give it."""

    role: Literal["teacher", "adapter", "text"]
    name: str


class Read(NamedTuple):
    """A file that is read.

    Attributes:
        role: what for.
        source: what the recipe calls it, or the folder that it lies in.
        name: its path in that folder.
        path: where it lies.
    """

    role: Role
    source: str
    name: str
    path: Path
