"""Norm weights folded into the layers that follow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..core.block import Block, Linear, Product
from ..core.params import Params
from ..core.passes import BlockPass, Need, PassContext, PassResult, Skip

if TYPE_CHECKING:
    from torch import Tensor


class FoldNormsParams(Params, frozen=True, kw_only=True):
    """Parameters of `fold-norms`."""


class FoldNorms(BlockPass[FoldNormsParams]):
    """Multiply the weights of norms into the layers that follow, so that every norm multiplies by 1.

    The function stays as it was. Rotations need it, and weights are rounded as what the input really multiplies. A
    LayerNorm keeps a bias, divided by its weight. Norms whose output goes elsewhere too (the router of a mixture, the
    residual of a post-norm block), norms that follow a layer, and the last norm before the head stay as they are.
    """

    name = "fold-norms"
    needs = frozenset({Need.CALIBRATION})
    before_rounding = True
    Params = FoldNormsParams

    def run_block(self, block: Block, linears: Iterable[Linear], context: PassContext) -> PassResult:  # noqa: ARG002
        """Fold the norms before `linears`."""
        result = PassResult()
        for stage in block.stages():
            for product in stage:
                result.absorb(_fold(block, product))
        return result


def _fold(block: Block, product: Product) -> PassResult:
    names = [linear.name for linear in product.linears]
    weight = block.norm_weight(product)
    if weight is None:
        return PassResult(skipped=[Skip(name, "no norm makes its input alone") for name in names])
    result = PassResult(changed=names, metrics={"folded_norms_count": 1})
    dead = weight == 0
    if bool(dead.any()):
        result.notes.append(f"{names[0]}: {int(dead.sum())} channels of its norm are 0 and stay so")
    block.balance(product, _ones_for(weight, dead))
    return result


def _ones_for(weight: Tensor, dead: Tensor) -> Tensor:
    return weight.masked_fill(dead, 1.0)
