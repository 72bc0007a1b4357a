"""Attention of a decoder with a cache, as ONNX Runtime's `GroupQueryAttention`.

One node takes the new queries, keys and values and the past, puts the new behind the past, and attends: so one graph
serves the prompt and every later token. What it is told of lengths is the width of the mask of tokens, not the size of
the past: the past may be a buffer that is longer than what it holds, and the same memory as the present.

ONNX Runtime 1.31 on a CPU, found by trial:

1. `local_window_size` counts a token itself: it is the window of transformers.
2. With an empty past it reads of `position_ids` the first number alone, which is wrong for texts padded on the left:
   queries and keys are rotated in front of it. It can also count by itself, by the places in the cache. What attention
   sees is how far two tokens are apart, so that is the same where no padding stands between tokens, as it does when a
   text padded on the right goes on. Then it takes queries, keys and values side by side too, as one product.
   Padding on the right it can leave out by itself: told how many tokens each text has, it sees no others, and puts the
   next one over the first of the padding.
3. Head sizes are multiples of 8.
4. Several tokens after a past that is not empty: for a batch of one only. A batch goes on token by token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..core.graph import SHARED_CACHE
from .attention import Attention, Mask, attentions
from .nodes import CONTRIB, Builder, constant, initializer, made_by, permutation, replace, size
from .rotary import POSITIONS, Rotation, Tables, rotate

if TYPE_CHECKING:
    from collections.abc import Sequence

PAST = "past_key_values."
Padding = Literal["any", "left", "right"]
"""Where padding may stand in a batch."""


@dataclass(slots=True)
class Lowering:
    """What was done.

    Attributes:
        attentions: how many attentions are GroupQueryAttention now.
        rotations: how many rotations of queries and keys are RotaryEmbedding now.
        inside: how many are done by the attention.
        left: (name, reason) of what was left as it was.
    """

    attentions: int = 0
    rotations: int = 0
    inside: int = 0
    left: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


@dataclass(frozen=True, slots=True)
class _Cache:
    """Keys or values: the past, and the new ones behind it."""

    past: ir.Value
    new: ir.Value
    present: ir.Value

    @classmethod
    def behind(cls, value: ir.Value) -> _Cache | None:
        node = made_by(value, "Concat")
        if node is None or len(node.inputs) != 2 or node.attributes.get_int("axis", 0) not in (-2, 2):
            return None
        past, new = node.inputs
        if past is None or new is None or not past.is_graph_input() or not value.is_graph_output():
            return None
        return cls(past, new, value)


def group_queries(model: ir.Model, *, positions: int | None, padding: Padding = "any") -> Lowering:
    """Replace each attention over a cache, in place.

    Args:
        model: a graph whose attention is `llmopt.Attention`.
        positions: how many positions the model knows, for the tables of its rotary embedding.
        padding: on one side only, attention may count positions by itself; on the right, it needs no mask either.
    """
    report = Lowering()
    if not any((value.name or "").startswith(PAST) for value in model.graph.inputs):
        return report
    lengths, tables = _Lengths(behind=padding == "right"), Tables(model, positions)
    for place, attention in enumerate(attentions(model)):
        site = _Site.of(attention)
        if isinstance(site, str):
            report.left.append((f"attention {place}", site))
            continue
        inputs = _rotate(site, tables, inside=padding != "any")
        if isinstance(inputs, str):
            report.left.append((f"rotary embedding {place}", inputs))
            inputs = _Inputs()
        turned = sum(each is not None for each in (inputs.query, inputs.key))
        report.inside += 0 if inputs.tables is None else turned
        report.rotations += turned if inputs.tables is None else 0
        _lower(site, inputs, lengths)
        report.attentions += 1
    RemoveUnusedNodesPass()(model)
    if padding != "any":
        _drop_positions(model.graph)
    if _shares_cache(model.graph):
        model.metadata_props[SHARED_CACHE] = "1"
    return report


def _shares_cache(graph: ir.Graph) -> bool:
    """Return whether nothing but GroupQueryAttention reads the past."""
    pasts = [value for value in graph.inputs if (value.name or "").startswith(PAST)]
    return all(user.op_type == "GroupQueryAttention" for value in pasts for user, _ in value.uses())


def _drop_positions(graph: ir.Graph) -> None:
    """Take `position_ids` out of the graph's inputs, if nothing reads more of it than its shape."""
    values = {value.name: value for value in graph.inputs}
    positions, ids = values.get(POSITIONS), values.get("input_ids")
    if positions is None or ids is None or positions.shape != ids.shape:
        return
    if all(user.op_type == "Shape" for user, _ in positions.uses()):
        positions.replace_all_uses_with(ids)
        graph.inputs.remove(positions)


def keep_last_logits(model: ir.Model) -> bool:
    """Compute logits for the last token alone, in place: of a prompt no other is needed to go on.

    Returns:
        Whether the product that makes the logits was found.
    """
    logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
    node = logits.producer() if logits is not None else None
    above: list[ir.Value] = []
    while node is not None and node.op_type in ("Mul", "Div", "Tanh", "Add"):
        above.append(node.outputs[0])
        varying = [value for value in node.inputs if value is not None and constant(value) is None]
        node = varying[0].producer() if len(varying) == 1 else None
    if node is None or node.op_type != "MatMul" or node.inputs[0] is None:
        return False
    hidden, builder = node.inputs[0], Builder(node)
    if hidden.shape is None or len(hidden.shape) != 3:
        return False
    bounds = [builder.constant([each]) for each in (-1, np.iinfo(np.int64).max, 1)]
    last = builder.op("Slice", hidden, *bounds, shape=[hidden.shape[0], 1, hidden.shape[2]])
    node.replace_input_with(0, last)
    for value in (*above, node.outputs[0]):
        if value.shape is not None and len(value.shape) == 3:
            value.shape = ir.Shape([value.shape[0], 1, value.shape[2]])
    return True


@dataclass(frozen=True, slots=True)
class _Site:
    """An attention that GroupQueryAttention can compute."""

    attention: Attention
    key: _Cache
    value: _Cache
    mask: Mask

    @classmethod
    def of(cls, attention: Attention) -> _Site | str:
        """Return it, or why it cannot be computed so."""
        key, value = _Cache.behind(attention.key), _Cache.behind(attention.value)
        mask, width = Mask.of(attention.mask), attention.head_size
        if key is None or value is None:
            return "its keys and values are not those of a cache with the new ones behind"
        if len(key.present.uses()) != 1 or len(value.present.uses()) != 1:
            return "another layer reads its cache"
        if mask is None or not mask.causal:
            return "its mask is not a causal one"
        if None in (attention.heads, attention.key_heads, width) or width != size(value.new, 3):
            return "its heads of values are not as wide as those of keys"
        if (width or 0) % 8:
            return f"its head size of {width} is not a multiple of 8"
        return cls(attention, key, value, mask)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What is attended to, (batch, tokens, heads * head size).

    Attributes:
        query: None where nothing turns it.
        key: None where nothing turns it.
        tables: cosines and sines, where attention turns both.
    """

    query: ir.Value | None = None
    key: ir.Value | None = None
    tables: tuple[ir.Value, ir.Value] | None = None


def _lower(site: _Site, inputs: _Inputs, lengths: _Lengths) -> None:
    attention, key, value, mask = site.attention, site.key, site.value, site.mask
    builder = Builder(attention.node)
    last, total, bias = lengths.of(builder, mask, attention.query.dtype)
    heads, head_size = attention.heads, attention.head_size
    assert heads is not None
    assert head_size is not None
    parts: list[ir.Value | None] = [
        inputs.query or side_by_side(builder, attention.query),
        inputs.key or side_by_side(builder, key.new),
        side_by_side(builder, value.new),
    ]
    if (packed := _pack(builder, parts)) is not None:
        parts = [packed, None, None]
    output, present_key, present_value = builder.ops(
        "GroupQueryAttention",
        *parts,
        key.past,
        value.past,
        last,
        total,
        *(inputs.tables or (None, None)),
        None,
        bias,
        outputs=3,
        domain=CONTRIB,
        num_heads=heads,
        kv_num_heads=attention.key_heads,
        scale=attention.scale,
        softcap=attention.softcap,
        local_window_size=mask.window or -1,
        do_rotary=int(inputs.tables is not None),
    )
    old = attention.node.outputs[0]
    output.shape = ir.Shape([*old.shape[:2], heads * head_size]) if old.shape is not None else None
    for user, _ in list(old.uses()):
        # Heads side by side again, as they are already.
        if user.op_type == "Reshape" and size(user.outputs[0], 2) == heads * head_size:
            replace(user.outputs[0], output)
    if old.uses():
        replace(old, builder.op("Reshape", output, builder.constant([0, 0, heads, head_size])))
    builder.graph.remove(attention.node, safe=True)
    for cache, present in ((key, present_key), (value, present_value)):
        concat = cache.present.producer()
        assert concat is not None
        replace(cache.present, present)
        builder.graph.remove(concat, safe=True)


def _rotate(site: _Site, tables: Tables, *, inside: bool) -> _Inputs | str:
    """Return queries and keys turned by RotaryEmbedding, or what attention is to turn; or why neither."""
    builder = Builder(site.attention.node)
    rotations = [Rotation.behind(site.attention.query), Rotation.behind(site.key.new)]
    found = [tables.of(rotation) if rotation is not None else None for rotation in rotations]
    reason = next((each for each in found if isinstance(each, str)), None)
    if reason is not None:
        return reason
    sources = [side_by_side(builder, rotation.source) if rotation is not None else None for rotation in rotations]
    width, both = site.attention.head_size or 0, found[0] if found[0] is found[1] else None
    whole = rotations[0] is not None and rotations[0].width == width and width % 16 == 0
    if inside and whole and not isinstance(both, str):
        return _Inputs(sources[0], sources[1], tables=both)
    turned = [
        rotate(builder, source, rotation, table)
        if source is not None and rotation is not None and isinstance(table, tuple)
        else None
        for source, rotation, table in zip(sources, rotations, found, strict=True)
    ]
    return _Inputs(turned[0], turned[1])


def _pack(builder: Builder, parts: Sequence[ir.Value | None]) -> ir.Value | None:
    """Return queries, keys and values side by side as one product, None if they are not products of one input."""
    biased = [made_by(part, "Add") for part in parts]
    biases = [constant(node.inputs[1]) if node is not None else None for node in biased]
    if any(biased) and any(bias is None for bias in biases):
        return None
    products = [
        made_by(part if node is None else node.inputs[0], "MatMul") for part, node in zip(parts, biased, strict=True)
    ]
    matrices = [constant(node.inputs[1]) if node is not None else None for node in products]
    sources = {node.inputs[0] for node in products if node is not None}
    if len(sources) != 1 or any(matrix is None or matrix.ndim != 2 for matrix in matrices):
        return None
    if any(len(part.uses()) > 1 for part in parts if part is not None):
        return None
    (source,) = sources
    weight = initializer(builder.graph, "qkv", np.concatenate([each for each in matrices if each is not None], 1))
    shape = source.shape if source is not None else None
    shape = [*shape[:2], size(weight, 1)] if shape is not None else None
    packed = builder.op("MatMul", source, weight, shape=shape)
    if any(biased):
        bias = np.concatenate([each for each in biases if each is not None])
        packed = builder.op("Add", packed, initializer(builder.graph, "qkv.bias", bias), shape=shape)
    return packed


class _Lengths:
    """What GroupQueryAttention is told of lengths and padding, made once for a mask.

    Args:
        behind: padding stands behind texts only.
    """

    def __init__(self, *, behind: bool) -> None:
        self._behind = behind
        self._made: dict[Any, tuple[ir.Value, ir.Value, ir.Value | None]] = {}

    def of(self, builder: Builder, mask: Mask, dtype: ir.DataType | None) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Return `seqlens_k` (batch), `total_sequence_length` and `attention_bias` (batch, 1, queries, keys)."""
        known = mask.padding, mask.batch, mask.queries, dtype
        if known not in self._made:
            self._made[known] = self._make(builder, mask, dtype)
        return self._made[known]

    def _make(
        self, builder: Builder, mask: Mask, dtype: ir.DataType | None
    ) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        assert dtype is not None
        b, op, kind = builder, builder.op, ir.DataType.INT32
        one, minus_one = b.constant([1]), b.constant([-1])
        batch, queries = op("Reshape", mask.batch, minus_one), op("Reshape", mask.queries, minus_one)
        width = op("Reshape", mask.keys, minus_one)
        if mask.padding is not None:
            width = op("Shape", mask.padding, start=1, end=2, dtype=ir.DataType.INT64)
        total = op("Cast", width, to=kind, dtype=kind, shape=[1])
        if self._behind and mask.padding is not None:
            lengths = op("ReduceSum", op("Cast", mask.padding, to=kind, dtype=kind), minus_one, keepdims=0)
            last = op("Sub", lengths, b.constant([1], np.int32), dtype=kind, shape=["batch"])
            return last, op("Squeeze", total, b.constant([0]), shape=[]), None
        # Every text is as long as the longest: what is padding the bias says.
        last = op("Expand", op("Sub", total, b.constant([1], np.int32)), batch, shape=["batch"])
        total = op("Squeeze", total, b.constant([0]), shape=[])
        if mask.padding is None:
            return last, total, None
        seen = mask.padding
        if seen.dtype != ir.DataType.BOOL:
            seen = op("Cast", seen, to=ir.DataType.BOOL, dtype=ir.DataType.BOOL)
        # Finite: a row that sees nothing must give numbers, which nobody reads, and not NaN.
        lowest = -30000.0 if dtype == ir.DataType.FLOAT16 else np.finfo(np.float32).min
        hidden = op("Where", seen, b.constant(0, dtype.numpy()), b.constant(lowest, dtype.numpy()), dtype=dtype)
        hidden = op("Unsqueeze", hidden, b.constant([1, 2]))
        return last, total, op("Expand", hidden, op("Concat", batch, one, queries, width, axis=0))


def side_by_side(builder: Builder, value: ir.Value) -> ir.Value:
    """Return (batch, heads, tokens, head size) as (batch, tokens, heads * head size)."""
    heads, width = size(value, 1), size(value, 3)
    assert heads is not None
    assert width is not None
    turned = made_by(value, "Transpose")
    apart = turned.inputs[0] if turned is not None and permutation(turned) == [0, 2, 1, 3] else None
    if apart is None:
        apart = builder.op("Transpose", value, perm=[0, 2, 1, 3])
    split = made_by(apart, "Reshape")
    source = split.inputs[0] if split is not None else None
    if source is not None and source.shape is not None and len(source.shape) == 3 and size(source, 2) == heads * width:
        return source
    shape = [*value.shape[:1], *value.shape[2:3], heads * width] if value.shape is not None else None
    return builder.op("Reshape", apart, builder.constant([0, 0, heads * width]), shape=shape)
