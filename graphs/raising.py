"""Finding attention again in a graph that spells it out.

What is one attention is told by its structure: softmax(scale * query @ key^T + mask) @ value, however the scale is
spread and the keys are turned. Whether a mask is that of the padding is told by trial (graphs/mask_trial.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .attention import ATTENTION, DOMAIN, MASK
from .folding import fold
from .mask_trial import HIDDEN, PADDING, hides_padding
from .nodes import Builder, constant, made_by, nodes_of, permutation, replace
from .opsets import ConversionError, convert_opset, opset_of
from .shapes import infer_shapes, rename_axes
from .simplification import simplify

_OPSET = 18
"""What our operators are spelled out in."""


@dataclass(slots=True)
class _Found:
    """An attention as it is spelled out.

    Attributes:
        end: the product with the values.
        query: (batch, heads, queries, head size).
        turned: the keys, (batch, heads, head size, keys).
        value: (batch, heads, keys, head size).
        scale: of the scores.
        mask: what is added to the scores, or says which keys are seen.
        seen: what a boolean mask says of a key that is seen; None where the mask is added.
    """

    end: ir.Node
    query: ir.Value
    turned: ir.Value
    value: ir.Value
    scale: float
    mask: ir.Value | None
    seen: bool | None = None


def raise_attention(model: ir.Model) -> int:
    """Write what is attention as our own operators, in place, and return how many there are.

    The graph is folded and simplified on the way, which brings what exporters write nearer to each other.
    """
    if opset_of(model) < _OPSET:
        try:
            convert_opset(model, _OPSET)
        except ConversionError:
            return 0
    _tidy(model)
    found = [each for node in nodes_of(model, "Softmax") if (each := _attention_of(node)) is not None]
    if not found:
        return 0
    masks = {each.mask: each.seen for each in found if each.mask is not None}
    padded = {mask for mask, seen in masks.items() if hides_padding(model, mask, seen=seen)}
    ours = _padding_mask(model) if padded else None
    raised = 0
    for each in found:
        if each.mask in padded:
            mask = ours
        elif each.seen is None:
            mask = each.mask
        else:
            continue
        _write(each, mask)
        raised += 1
    if raised:
        model.opset_imports[DOMAIN] = 1
    padding = next((value for value in model.graph.inputs if value.name == PADDING), None)
    if padded and padding is not None:
        _agree(model, padding, found[0].query)
    _tidy(model)
    return raised


def _tidy(model: ir.Model) -> None:
    fold(model)
    infer_shapes(model)
    simplify(model)
    fold(model)


def _attention_of(softmax: ir.Node) -> _Found | None:
    """Return the attention around a softmax, None if there is none."""
    weights, scores = softmax.outputs[0], softmax.inputs[0]
    rank = len(weights.shape) if weights.shape is not None else 0
    if rank != 4 or scores is None or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return None
    end = _product_with_values(weights)
    if end is None or end.inputs[1] is None:
        return None
    scores, mask, seen = _without_mask(scores)
    scores, scale = _without_scale(scores)
    product = made_by(scores, "MatMul")
    if product is None:
        return None
    query, by_query = _without_scale(product.inputs[0])
    turned, by_key = _without_scale(product.inputs[1])
    parts = (query, turned, end.inputs[1])
    if any(part is None or part.shape is None or len(part.shape) != 4 for part in parts):
        return None
    assert query is not None
    assert turned is not None
    return _Found(end, query, turned, end.inputs[1], scale * by_query * by_key, mask, seen)


def _product_with_values(weights: ir.Value) -> ir.Node | None:
    """Follow the softmax to the product that it goes into, past a dropout and a guard against NaN."""
    users = list(weights.consumers())
    guard = next((user for user in users if user.op_type == "Where"), None)
    if len(users) == 2 and guard is not None:
        test = made_by(guard.inputs[0], "IsNaN")
        if test is None or test.inputs[0] is not weights or guard.inputs[2] is not weights:
            return None
        return _product_with_values(guard.outputs[0])
    if len(users) != 1 or weights.is_graph_output():
        return None
    if users[0].op_type in ("Dropout", "Identity"):
        return _product_with_values(users[0].outputs[0])
    return users[0] if users[0].op_type == "MatMul" and users[0].inputs[0] is weights else None


def _without_mask(scores: ir.Value) -> tuple[ir.Value | None, ir.Value | None, bool | None]:
    """Return scores before a mask, the mask, and what it says of a key that is seen: None where it is added."""
    if (added := made_by(scores, "Add")) is not None:
        first, second = added.inputs
        return (first, second, None) if _is_scores(first) else (second, first, None)
    chosen = made_by(scores, "Where")
    if chosen is not None:
        condition, first, second = chosen.inputs
        if _is_lowest(first):
            return second, condition, False
        if _is_lowest(second):
            return first, condition, True
    return scores, None, None


def _is_scores(value: ir.Value | None) -> bool:
    return made_by(_without_scale(value)[0], "MatMul") is not None


def _is_lowest(value: ir.Value | None) -> bool:
    number = constant(value)
    return number is not None and number.size == 1 and float(number.reshape(())) <= HIDDEN


def _without_scale(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """Return a value before it was multiplied or divided by numbers, and their product."""
    scale = 1.0
    while value is not None and (node := value.producer()) is not None and node.op_type in ("Mul", "Div"):
        first, second = node.inputs
        number, rest = constant(second), first
        if number is None and node.op_type == "Mul":
            number, rest = constant(first), second
        if number is None or number.size != 1:
            break
        factor = float(number.reshape(()))
        scale, value = (scale * factor if node.op_type == "Mul" else scale / factor), rest
    return value, scale


def _write(found: _Found, mask: ir.Value | None) -> None:
    builder, end = Builder(found.end), found.end
    shape = end.outputs[0].shape
    order = None if shape is None else [shape[axis] for axis in (0, 2, 1, 3)]
    inputs = [found.query, _key(builder, found.turned), found.value, mask]
    settings = {"scale": found.scale, "softcap": 0.0, "causal": 0}
    out = builder.op(ATTENTION, *inputs, domain=DOMAIN, dtype=found.query.dtype, shape=order, **settings)
    replace(end.outputs[0], builder.op("Transpose", out, perm=[0, 2, 1, 3], shape=shape))
    builder.graph.remove(end, safe=True)


def _key(builder: Builder, turned: ir.Value) -> ir.Value:
    """Return keys as (batch, heads, keys, head size), turned back as near to where they came from as can be."""
    shape = [turned.shape[axis] for axis in (0, 1, 3, 2)] if turned.shape is not None else None
    node = made_by(turned, "Transpose")
    if node is not None and node.inputs[0] is not None:
        if permutation(node) == [0, 1, 3, 2]:
            return node.inputs[0]
        order = [permutation(node)[axis] for axis in (0, 1, 3, 2)]
        return builder.op("Transpose", node.inputs[0], perm=order, shape=shape)
    # PyTorch's own attention turns them as (batch * heads, keys, head size).
    flat = made_by(turned, "Reshape")
    swap = made_by(flat.inputs[0], "Transpose") if flat is not None else None
    merged = made_by(swap.inputs[0], "Reshape") if swap is not None and permutation(swap) == [0, 2, 1] else None
    source = merged.inputs[0] if merged is not None else None
    if source is not None and source.shape is not None and shape is not None and list(source.shape) == shape:
        return source
    return builder.op("Transpose", turned, perm=[0, 1, 3, 2], shape=shape)


# Masks


def _padding_mask(model: ir.Model) -> ir.Value:
    """Add the mask of the padding in front of everything else."""
    padding = next(value for value in model.graph.inputs if value.name == PADDING)
    builder = Builder(model.graph[0])
    batch, keys = (
        builder.op("Squeeze", builder.op("Shape", padding, start=axis, end=axis + 1), builder.constant([0]))
        for axis in (0, 1)
    )
    for scalar in (batch, keys):
        scalar.dtype = ir.DataType.INT64
    dims = list(padding.shape) if padding.shape is not None else ["batch", "keys"]
    mask = builder.op(MASK, padding, batch, keys, keys, domain=DOMAIN, causal=0, window=0, dtype=ir.DataType.BOOL)
    mask.shape = ir.Shape([dims[0], 1, dims[1], dims[1]])
    return mask


def _agree(model: ir.Model, padding: ir.Value, query: ir.Value) -> None:
    """Call the axes of the padding what the queries' are called: an exporter may take each input's for its own."""
    if padding.shape is None or query.shape is None:
        return
    pairs = zip(padding.shape, (query.shape[0], query.shape[2]), strict=True)
    names = {
        str(own.value): str(other.value)
        for own, other in pairs
        if isinstance(own, ir.SymbolicDim) and isinstance(other, ir.SymbolicDim) and own != other
    }
    rename_axes(model, names)
