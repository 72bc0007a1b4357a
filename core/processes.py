"""Several processes that train together, as `accelerate launch` or `torchrun` start them."""

from __future__ import annotations

import os


def world_size() -> int:
    """Return how many processes work together; 1 when none of those launchers started this one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this process writes the artifact and speaks to the user; the others only help to train."""
    return int(os.environ.get("RANK", "0")) == 0
