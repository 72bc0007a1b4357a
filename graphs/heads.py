"""Attention of an encoder as ONNX Runtime's `MultiHeadAttention`.

query, key, value      (batch, tokens, heads * head size)
key_padding_mask       int32 (batch, keys), 0 where there is padding
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .attention import Attention, Mask, attentions
from .decoder import PAST, side_by_side
from .nodes import CONTRIB, Builder, replace, size

if TYPE_CHECKING:
    from collections.abc import Iterator


def attend_with_heads(model: ir.Model) -> tuple[int, list[tuple[str, str]]]:
    """Replace each attention that the operator can compute, in place.

    Returns:
        How many, and (name, reason) of those that are left.
    """
    count, left, masks = 0, list[tuple[str, str]](), dict[ir.Value, ir.Value]()
    cached = any((value.name or "").startswith(PAST) for value in model.graph.inputs)
    for place, attention in enumerate(attentions(model)):
        reason = next(_reasons(attention, cached=cached), None)
        if reason is None:
            _replace(attention, masks)
            count += 1
        else:
            left.append((f"attention {place}", reason))
    RemoveUnusedNodesPass()(model)
    if count:
        model.opset_imports.setdefault(CONTRIB, 1)
    return count, left


def _reasons(attention: Attention, *, cached: bool) -> Iterator[str]:
    mask = Mask.of(attention.mask)
    if cached:
        yield "it has a cache, and of GroupQueryAttention on CUDA is not known whether it takes padding"
    if attention.softcap:
        yield "MultiHeadAttention does not limit scores"
    if None in (attention.heads, attention.head_size, size(attention.value, 3)):
        yield "its heads are not known"
    if attention.heads != attention.key_heads:
        yield "several heads of queries share one of keys"
    if attention.causal or (mask is not None and (mask.causal or mask.window)):
        yield "its mask hides more than padding"
    if attention.mask is not None and mask is None:
        yield "its mask is not one of padding"


def _replace(attention: Attention, masks: dict[ir.Value, ir.Value]) -> None:
    builder, node = Builder(attention.node), attention.node
    mask = Mask.of(attention.mask)
    padding = None
    if mask is not None and mask.padding is not None:
        if mask.padding not in masks:
            kind = ir.DataType.INT32
            masks[mask.padding] = builder.op("Cast", mask.padding, to=kind, dtype=kind, shape=mask.padding.shape)
        padding = masks[mask.padding]
    parts = [side_by_side(builder, value) for value in (attention.query, attention.key, attention.value)]
    heads, width = attention.heads or 0, size(attention.value, 3) or 0
    made = builder.op(
        "MultiHeadAttention",
        *parts,
        *((None, padding) if padding is not None else ()),
        domain=CONTRIB,
        num_heads=heads,
        scale=attention.scale,
    )
    old = node.outputs[0]
    made.shape = ir.Shape([*old.shape[:2], heads * width]) if old.shape is not None else None
    for user, _ in list(old.uses()):
        # Heads side by side again, as they are already.
        if user.op_type == "Reshape" and size(user.outputs[0], 2) == heads * width:
            replace(user.outputs[0], made)
    if old.uses():
        replace(old, builder.op("Reshape", made, builder.constant([0, 0, heads, width])))
    builder.graph.remove(node, safe=True)
