"""Several processes that train together, as `accelerate launch`, `torchrun` or `mpirun` start them."""

from __future__ import annotations

import os

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def world_size() -> int:
    """Return how many processes work together; 1 when none of those launchers started this one."""
    return _number(_SIZES, 1)


def is_main() -> bool:
    """Return whether this process writes the artifact and speaks to the user; the others only help to train."""
    return _number(_RANKS, 0) == 0


def left_alone() -> bool:
    """Return whether accelerate was to start several processes and started one, as it does on machines without GPUs."""
    several = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    return several and not any(name in os.environ for name in _SIZES)


def _number(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)
