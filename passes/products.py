"""What passes that go through a block product by product have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from ..core.block import Block, Linear, Product, Stage
from ..core.passes import Skip

if TYPE_CHECKING:
    from torch import Tensor

    from .numerics.correction import Drift
    from .numerics.hessian import Hessian

NO_PRODUCER = "nothing before it can take up a scale"
NO_TOKEN = "no calibration token reaches it"  # noqa: S105  (no password)


def unreached(block: Block, wanted: Iterable[Linear]) -> list[Skip]:
    """Return a skip for each of `wanted` that the forward pass never comes to."""
    reached = {linear for stage in block.stages() for product in stage for linear in product.linears}
    left = set(wanted) - reached
    return [Skip(linear.name, "the calibration samples never reach it") for linear in block.linears if linear in left]


def among(stage: Stage, wanted: Collection[Linear]) -> Stage:
    """Return the products of a stage with no other layers than `wanted`; none that has none of them."""
    left = (tuple(linear for linear in product.linears if linear in wanted) for product in stage)
    return tuple(Product(members) for members in left if members)


def hessians_of(block: Block, products: Stage) -> dict[Product, Hessian]:
    """Return the mean of x xᵀ over the calibration tokens that reach each product, with all that was changed so far."""
    from .numerics.hessian import Hessian

    hessians = {product: Hessian(product.in_features) for product in products}
    if hessians:
        block.collect(products, lambda product, rows: hessians[product].add(rows))
    return hessians


def hessians_and_drifts_of(block: Block, products: Stage) -> tuple[dict[Product, Hessian], dict[Product, Drift]]:
    """Return what `hessians_of` does, and how far the input of each product has moved since nothing was rounded.

    An expert has no drift: which tokens come to it is not the same any more.
    """
    from .numerics.correction import Drift
    from .numerics.hessian import Hessian

    hessians = {product: Hessian(product.in_features) for product in products}
    drifts: dict[Product, Drift] = {}

    def add(product: Product, rows: Tensor, exact: Tensor | None) -> None:
        hessians[product].add(rows)
        if exact is not None:
            drifts.setdefault(product, Drift(product.in_features)).add(rows, exact)

    if hessians:
        block.collect_pairs(products, add)
    return hessians, drifts


def in_parts(stage: Stage, nbytes: int) -> list[Stage]:
    """Divide products so that the Hessians of a part take no more than `nbytes`, or are but one."""
    parts: list[Stage] = []
    left = 0
    for product in stage:
        size = 4 * product.in_features**2
        if parts and size <= left:
            parts[-1] = (*parts[-1], product)
            left -= size
        else:
            parts.append((product,))
            left = nbytes - size
    return parts


def stacked_mask(block: Block, linears: Sequence[Linear]) -> Tensor | None:
    """Return the masks of layers of one input, one above the other; None where none of them is sparse."""
    import torch

    masks = [block.mask(linear) for linear in linears]
    if all(mask is None for mask in masks):
        return None
    shapes = [(linear.out_features, linear.in_features) for linear in linears]
    return torch.cat(
        [
            torch.ones(shape, dtype=torch.bool) if mask is None else mask
            for mask, shape in zip(masks, shapes, strict=True)
        ]
    )
