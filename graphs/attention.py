"""Attention as one node, and what it becomes.

While a model is traced its attention becomes two operators of our own, so that the graph says what is computed instead
of spelling it out in a way that no later pass could read:

    llmopt.Attention(query, key, value, mask)        softmax(scale * query @ key^T + mask) @ value
    llmopt.Mask(padding, batch, queries, keys)       which keys a query may see

`Attention` takes (batch, heads, tokens, head size) and gives (batch, tokens, heads, head size); fewer heads of keys and
values than of queries are shared by equal groups. Its mask is boolean, or floating point and added. `Mask` gives
(batch, 1, queries, keys), true where the key is no padding and, if causal, not after the query, nor `window` tokens or
more before it; the queries are the last of the keys.

`Attention` may say that its texts are short. OpenVINO computes it in one kernel, head by head and text by text, the
start of which takes longer than the products of a short text; `short` spells it out so that OpenVINO does not recognize
it, and each operator computes all heads of all texts at once. Its scores are (batch, heads, keys, queries) then: the
softmax goes through as many queries at a time as a vector holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .nodes import Builder, made_by, nodes_of, permutation, replace, size

if TYPE_CHECKING:
    pass

DOMAIN = "llmopt"
ATTENTION, MASK = "Attention", "Mask"


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention node.

    Attributes:
        node: the node.
        query: (batch, heads, queries, head size).
        key: (batch, key heads, keys, head size).
        value: (batch, key heads, keys, head size of values).
        mask: (batch or 1, heads or 1, queries or 1, keys), None when every key is seen.
        scale: of the products of queries and keys.
        softcap: their limit, 0 for none.
        causal: whether queries see no later keys, beside the mask; the first query then is as old as the first key.
        short: whether one operator after the other is faster than one kernel. Ignored where heads are shared.
    """

    node: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value | None
    scale: float
    softcap: float
    causal: bool
    short: bool

    @classmethod
    def of(cls, node: ir.Node) -> Attention:
        """Read a node."""
        query, key, value = node.inputs[:3]
        assert query is not None
        assert key is not None
        assert value is not None
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        read = node.attributes
        return cls(
            node,
            query,
            key,
            value,
            mask,
            read.get_float("scale", 1.0),
            read.get_float("softcap", 0.0),
            bool(read.get_int("causal", 0)),
            bool(read.get_int("short", 0)),
        )

    @property
    def heads(self) -> int | None:
        """Heads of queries, where the graph says."""
        return size(self.query, 1)

    @property
    def key_heads(self) -> int | None:
        """Heads of keys and values, where the graph says."""
        return size(self.key, 1)

    @property
    def head_size(self) -> int | None:
        """Width of a head of queries and keys, where the graph says."""
        return size(self.query, 3)


@dataclass(frozen=True, slots=True)
class Mask:
    """A mask node.

    Attributes:
        node: the node.
        padding: (batch, keys), true or not 0 where there is a token; None when there is no padding.
        batch: int64 scalar.
        queries: int64 scalar.
        keys: int64 scalar.
        causal: whether queries see no later keys.
        window: how many keys up to itself a query sees, 0 for all.
    """

    node: ir.Node
    padding: ir.Value | None
    batch: ir.Value
    queries: ir.Value
    keys: ir.Value
    causal: bool
    window: int

    @classmethod
    def of(cls, value: ir.Value | None) -> Mask | None:
        """Return the mask that `value` is, None if it is made in another way."""
        node = made_by(value, MASK, DOMAIN)
        if node is None:
            return None
        padding, batch, queries, keys = node.inputs
        assert batch is not None
        assert queries is not None
        assert keys is not None
        read = node.attributes
        return cls(node, padding, batch, queries, keys, bool(read.get_int("causal", 0)), read.get_int("window", 0))


def attentions(model: ir.Model) -> list[Attention]:
    """Return the attention nodes in the order of the graph."""
    return [Attention.of(node) for node in nodes_of(model, ATTENTION, DOMAIN)]


def spell_out(model: ir.Model) -> int:
    """Replace what is left of our operators by standard ones.

    Returns:
        How many attentions there were.
    """
    found = attentions(model)
    biases: dict[Any, ir.Value] = {}
    for attention in found:
        _spell_out(attention, biases)
    for node in nodes_of(model, MASK, DOMAIN):
        builder = Builder(node)
        mask = Mask.of(node.outputs[0])
        assert mask is not None
        lengths = [
            _one(builder, mask.batch),
            builder.constant([1]),
            _one(builder, mask.queries),
            _one(builder, mask.keys),
        ]
        shape = builder.op("Concat", *lengths, axis=0)
        replace(node.outputs[0], builder.op("Expand", _seen(builder, mask), shape, dtype=ir.DataType.BOOL))
        builder.graph.remove(node, safe=True)
    RemoveUnusedNodesPass()(model)
    model.opset_imports.pop(DOMAIN, None)
    for graph in model.graphs():
        graph.opset_imports.pop(DOMAIN, None)
    return len(found)


def _spell_out(attention: Attention, biases: dict[Any, ir.Value]) -> None:
    """Write the attention with products and a softmax."""
    node, builder = attention.node, Builder(attention.node)
    dtype = attention.query.dtype
    assert dtype is not None
    query, key, value = attention.query, attention.key, attention.value
    heads, key_heads = attention.heads, attention.key_heads
    grouped = heads != key_heads
    by_key = attention.short and not grouped  # scores are (batch, heads, keys, queries)
    if attention.scale != 1:
        query = builder.op("Mul", query, builder.constant(attention.scale, dtype.numpy()))
    if grouped:
        # (batch, key heads, group, tokens, head size), so that keys and values are not repeated.
        assert heads is not None
        assert key_heads is not None
        query = builder.op(
            "Reshape", query, builder.constant([0, key_heads, heads // key_heads, -1, attention.head_size])
        )
        key = builder.op("Unsqueeze", key, builder.constant([2]))
        value = builder.op("Unsqueeze", value, builder.constant([2]))
    left, right = (key, query) if by_key else (query, key)
    scores = builder.op("MatMul", left, _turned(builder, right, grouped=grouped))
    if attention.softcap:
        cap = builder.constant(attention.softcap, dtype.numpy())
        scores = builder.op("Mul", builder.op("Tanh", builder.op("Div", scores, cap)), cap)
    bias = _bias(builder, attention, biases)
    if bias is not None:
        bias = builder.op("Unsqueeze", bias, builder.constant([1])) if grouped else bias
        bias = builder.op("Transpose", bias, perm=[0, 1, 3, 2]) if by_key else bias
        scores = builder.op("Add", scores, bias)
    weights = builder.op("Softmax", scores, axis=2 if by_key else -1)
    weights = builder.op("Transpose", weights, perm=[0, 1, 3, 2]) if by_key else weights
    out = builder.op("MatMul", weights, value)
    out = builder.op("Transpose", out, perm=[0, 3, 1, 2, 4] if grouped else [0, 2, 1, 3])
    if grouped:
        out = builder.op("Reshape", out, builder.constant([0, 0, heads, -1]))
    replace(node.outputs[0], out)
    builder.graph.remove(node, safe=True)


def _turned(builder: Builder, key: ir.Value, *, grouped: bool) -> ir.Value:
    """Return keys, or queries, with their last two axes exchanged."""
    swap = None if grouped else made_by(key, "Transpose")
    if swap is not None and permutation(swap) == [0, 2, 1, 3]:
        return builder.op("Transpose", swap.inputs[0], perm=[0, 2, 3, 1])
    return builder.op("Transpose", key, perm=[0, 1, 2, 4, 3] if grouped else [0, 1, 3, 2])


def _bias(builder: Builder, attention: Attention, biases: dict[Any, ir.Value]) -> ir.Value | None:
    """Return what is added to the scores; the same mask gives the same value."""
    if attention.causal:
        return _causal_bias(builder, attention)
    mask, dtype = attention.mask, attention.query.dtype
    if mask is None or mask.dtype != ir.DataType.BOOL:
        return mask
    assert dtype is not None
    if (mask, dtype) not in biases:
        known = Mask.of(mask)
        seen = mask if known is None else _seen(builder, known)
        biases[mask, dtype] = _where(builder, seen, dtype)
    return biases[mask, dtype]


def _where(builder: Builder, seen: ir.Value, dtype: ir.DataType) -> ir.Value:
    kind = dtype.numpy()
    # Finite: a row that sees nothing must give numbers, which nobody reads, and not NaN.
    lowest = -30000.0 if dtype == ir.DataType.FLOAT16 else np.finfo(np.float32).min
    return builder.op("Where", seen, builder.constant(0, kind), builder.constant(lowest, kind), dtype=dtype)


def _seen(builder: Builder, mask: Mask) -> ir.Value:
    """Return what the mask says, as (batch or 1, 1, queries or 1, keys) booleans."""
    seen: ir.Value | None = None
    if mask.causal or mask.window:
        keys, queries = mask.keys, mask.queries
        zero, one = builder.constant(0), builder.constant(1)
        places = builder.op("Range", zero, keys, one)
        first = builder.op("Sub", keys, queries)
        own = builder.op("Unsqueeze", builder.op("Range", first, keys, one), builder.constant([1]))
        if mask.causal:
            seen = builder.op("LessOrEqual", places, own, dtype=ir.DataType.BOOL)
        if mask.window:
            begin = builder.op("Sub", own, builder.constant(mask.window))
            near = builder.op("Greater", places, begin, dtype=ir.DataType.BOOL)
            seen = near if seen is None else builder.op("And", seen, near)
        seen = builder.op("Unsqueeze", seen, builder.constant([0, 1]))
    if mask.padding is not None:
        padding = mask.padding
        if padding.dtype != ir.DataType.BOOL:
            padding = builder.op("Cast", padding, to=ir.DataType.BOOL, dtype=ir.DataType.BOOL)
        padding = builder.op("Unsqueeze", padding, builder.constant([1, 2]))
        seen = padding if seen is None else builder.op("And", seen, padding)
    return builder.constant([[[[True]]]], np.bool_) if seen is None else seen


def _causal_bias(builder: Builder, attention: Attention) -> ir.Value:
    dtype = attention.query.dtype
    assert dtype is not None
    length = _length(builder, attention.key, 2)
    own = builder.op("Range", builder.constant(0), _length(builder, attention.query, 2), builder.constant(1))
    places = builder.op("Range", builder.constant(0), length, builder.constant(1))
    own = builder.op("Unsqueeze", own, builder.constant([1]))
    seen = builder.op("LessOrEqual", places, own, dtype=ir.DataType.BOOL)
    return _where(builder, builder.op("Unsqueeze", seen, builder.constant([0, 1])), dtype)


def _length(builder: Builder, value: ir.Value, axis: int) -> ir.Value:
    """Return the size of an axis as an int64 scalar."""
    shape = builder.op("Shape", value, start=axis, end=axis + 1, dtype=ir.DataType.INT64)
    return builder.op("Squeeze", shape, builder.constant([0]))


def _one(builder: Builder, scalar: ir.Value) -> ir.Value:
    return builder.op("Reshape", scalar, builder.constant([1]))
