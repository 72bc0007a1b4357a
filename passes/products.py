"""What passes that go through a block product by product say of those they leave alone."""

from __future__ import annotations

from collections.abc import Iterable

from ..core.model import Block, Linear
from ..core.passes import Skip

NO_PRODUCER = "nothing before it can take up a scale"
NO_TOKEN = "no calibration token reaches it"  # noqa: S105  (no password)


def unreached(block: Block, wanted: Iterable[Linear]) -> list[Skip]:
    """Return a skip for each of `wanted` that the forward pass never comes to."""
    reached = {linear for stage in block.stages() for product in stage for linear in product.linears}
    left = set(wanted) - reached
    return [Skip(linear.name, "the calibration samples never reach it") for linear in block.linears if linear in left]
