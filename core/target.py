"""Where an artifact will run."""

from __future__ import annotations

from enum import StrEnum


class Target(StrEnum):
    """The kind of machine an artifact is for; exporters and fusions choose operators by it."""

    CPU = "cpu"
    CUDA = "cuda"
    EDGE = "edge"
