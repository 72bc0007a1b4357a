"""Padding removal: an encoder computes its tokens, not the rectangle that a batch is padded to.

The graph is rewritten so that everything that treats tokens one by one works on the batch's real tokens in one row of
T, as if batch were 1 and sequence T. Only attention sees the texts apart: their tokens are gathered, attended to and
put back, in groups of texts of similar length, so that a group is padded to its own longest text. All of it is standard
operators; the idea is ByteTransformer's and FasterTransformer's (Zhai et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .attention import ATTENTION, DOMAIN, Attention, Mask, attentions
from .nodes import BROADCASTING, CONTRIB, UNARY, Builder, constant, made_by, permutation, size
from .token_index import TokenIndex

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .token_index import Layout

_CHANNELS = """
    LayerNormalization RMSNormalization SimplifiedLayerNormalization SkipLayerNormalization
    SkipSimplifiedLayerNormalization BiasGelu
"""
_OVER_CHANNELS = frozenset(_CHANNELS.split())

_FLOAT_BYTES = 4


@dataclass(slots=True)
class Removal:
    """What was done.

    Attributes:
        attentions: how many attentions now see only real tokens.
        left: (name, reason) of those that were left as they were.
        padded: names of the values that are padded again, because something reads them that is not token by token.
        moved: bytes that gathers read and write for each token, beside the work that the padded graph does too.
    """

    attentions: int = 0
    moved: int = 0
    left: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    padded: list[str] = field(default_factory=list[str])


def remove_padding(model: ir.Model, layout: Layout) -> Removal:
    """Rewrite the graph in place.

    Args:
        model: a graph whose attention is `llmopt.Attention`, with the shapes of all values.
        layout: how texts lie in the row and are divided for attention.
    """
    report = Removal()
    chosen: list[Attention] = []
    padding: ir.Value | None = None
    for attention in attentions(model):
        mask, reason = _padding_of(attention)
        if reason is None and padding is not None and mask is not padding:
            reason = "its padding is not that of the first"
        if reason is not None:
            report.left.append((attention.node.name or "attention", reason))
            continue
        padding = mask
        chosen.append(attention)
    if padding is None:
        return report
    _Packing(model, padding, chosen, report, layout).run()
    return report


def _padding_of(attention: Attention) -> tuple[ir.Value | None, str | None]:
    """Return the mask of tokens that an attention obeys, or why it cannot be packed."""
    if attention.mask is None:
        return None, "it has no mask"
    mask = Mask.of(attention.mask)
    masks = [mask] if mask is not None else _masks_behind(attention.mask)
    if len(masks) != 1 or masks[0].padding is None:
        return None, "no mask of tokens is found behind its mask"
    if masks[0].causal or attention.causal or masks[0].window:
        return None, "it is causal, or sees a window"
    shape, padding = attention.query.shape, masks[0].padding
    if padding.shape is None or len(padding.shape) != 2 or shape is None or attention.key.shape is None:
        return None, "the sizes of its inputs are not known"
    batch, tokens = padding.shape
    if (shape[0], shape[2]) != (batch, tokens) or (attention.key.shape[0], attention.key.shape[2]) != (batch, tokens):
        return None, "its queries are other tokens than its keys"
    return padding, None


def _masks_behind(value: ir.Value) -> list[Mask]:
    found: dict[ir.Node, Mask] = {}
    stack: list[ir.Value | None] = [value]
    seen: set[ir.Value] = set()
    while stack:
        current = stack.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        if (mask := Mask.of(current)) is not None:
            found[mask.node] = mask
        elif (node := current.producer()) is not None:
            stack += node.inputs
    return list(found.values())


class _Packing:
    """One rewriting. `packed` holds, for a value of the graph, the same with batch 1 and sequence T."""

    def __init__(
        self,
        model: ir.Model,
        padding: ir.Value,
        chosen: Sequence[Attention],
        report: Removal,
        layout: Layout,
    ) -> None:
        self.model = model
        self.padding = padding
        self.chosen = {attention.node: attention for attention in chosen}
        self.report = report
        self.packed: dict[ir.Value, ir.Value] = {}
        self.unpacked: dict[ir.Value, ir.Value] = {}
        assert padding.shape is not None
        self.batch, self.tokens = padding.shape
        self.end = ir.node("Identity", [padding])  # everything new is put before it, and sorted afterwards
        model.graph.append(self.end)
        self.builder = Builder(self.end)
        self.index = TokenIndex(self.builder, padding, layout)

    def run(self) -> None:
        nodes = [node for node in self.model.graph if node is not self.end and not self.index.owns(node)]
        done: set[ir.Node] = set()
        for node in nodes:
            if self._pack_node(node):
                done.add(node)
        for node in nodes:
            if node not in done:
                self._feed(node)
        for place, value in enumerate(self.model.graph.outputs):
            if value in self.packed:
                name, value.name = value.name, f"{value.name}_packed"
                full = self.builder.op("Identity", self._unpack(value))
                full.name, full.shape, full.type = name, value.shape, value.type
                self.model.graph.outputs[place] = full
        self.model.graph.remove(self.end, safe=True)
        RemoveUnusedNodesPass()(self.model)
        self.model.graph.sort()
        self.report.attentions = len(self.chosen)

    # What becomes of a node

    def _pack_node(self, node: ir.Node) -> bool:
        """Do the node's work on packed values, if it treats tokens one by one."""
        if node in self.chosen:
            return self._pack_attention(self.chosen[node])
        if node.op_type == "Gather" and not node.domain and self._pack_embedding(node):
            return True
        known = node.domain in ("", CONTRIB) and self._is_rectangle(node.outputs[0])
        if not known or not any(value in self.packed for value in node.inputs if value is not None):
            return False
        if node.op_type == "Mul" and (passed := self._masked(node)) is not None:
            self.packed[node.outputs[0]] = passed
            return True
        if node.op_type == "Reshape":
            return self._pack_reshape(node)
        inputs = self._operands(node)
        if inputs is None:
            return False
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        copies = self.builder.ops(node.op_type, *inputs, outputs=len(node.outputs), domain=node.domain, **attributes)
        for old, new in zip(node.outputs, copies, strict=True):
            self._keep(old, new)
        return True

    def _operands(self, node: ir.Node) -> list[ir.Value | None] | None:
        """Return what the node reads when its values are packed, None if it does not treat tokens one by one."""
        if node.op_type in UNARY or self._is_over_channels(node):
            return [self.packed.get(value, value) if value is not None else None for value in node.inputs]
        if node.op_type not in BROADCASTING:
            return None
        rank = _rank(node.outputs[0])
        found = [self._operand(value, rank) for value in node.inputs if value is not None]
        return None if any(value is None for value in found) else found

    def _is_over_channels(self, node: ir.Node) -> bool:
        """Return whether the node works along the axes behind batch and sequence, with constants beside its input."""
        first, *rest = node.inputs
        if first not in self.packed or first is None or first.shape is None:
            return False
        place, rank, operator = self._place(first), len(first.shape), node.op_type
        if operator in _OVER_CHANNELS:
            axis = node.attributes.get_int("axis", -1) % rank
            others = [value for value in rest if value is not None and value not in self.packed]
            return axis == rank - 1 and place < axis and all(constant(value) is not None for value in others)
        if operator == "MatMul":
            matrix = rest[0]
            return (
                matrix is not None
                and matrix not in self.packed
                and self._is_free(matrix)
                and _rank(matrix) == 2
                and place < rank - 1
            )
        if operator in ("Softmax", "Split", "Concat"):
            axis = node.attributes.get_int("axis", -1) % rank
            together = operator != "Concat" or all(value in self.packed for value in node.inputs)
            return axis > place and together
        if operator == "Transpose":
            return permutation(node)[:1] == [0] and len(permutation(node)) == rank
        axes = {"Slice": 3, "Unsqueeze": 1, "ReduceMean": 1, "ReduceSum": 1, "ReduceMax": 1}.get(operator)
        if axes is None or len(node.inputs) <= axes:
            return False
        given = constant(node.inputs[axes])
        return given is not None and all(int(axis) % rank > place for axis in given)

    def _pack_embedding(self, node: ir.Node) -> bool:
        """Look up the real tokens alone, where a table is read at (batch, sequence) numbers."""
        table, numbers = node.inputs
        if table is None or numbers is None or constant(table) is None or node.attributes.get_int("axis", 0) != 0:
            return False
        if list(numbers.shape or ()) != [self.batch, self.tokens]:
            return False
        self._keep(node.outputs[0], self.builder.op("Gather", table, self._pack(numbers), axis=0, dtype=table.dtype))
        return True

    def _pack_reshape(self, node: ir.Node) -> bool:
        source, target = node.inputs[0], node.outputs[0]
        if source not in self.packed or source is None or self._place(source) != 1 or self._place(target) != 1:
            return False
        assert target.shape is not None
        rest = list(target.shape)[2:]
        if not all(isinstance(dimension, int) for dimension in rest):
            return False
        shape = self.builder.constant([0, 0, *rest])
        self._keep(target, self.builder.op("Reshape", self.packed[source], shape))
        return True

    def _masked(self, node: ir.Node) -> ir.Value | None:
        """Return the packed factor of a product whose other factor is the mask: for real tokens that is 1."""
        for value, other in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            if value in self.packed and value is not None and _is_mask(other, self.padding):
                return self.packed[value]
        return None

    def _operand(self, value: ir.Value, rank: int) -> ir.Value | None:
        """Return an operand of a broadcasting operator as it meets packed values, None if it cannot."""
        if value in self.packed:
            return self.packed[value]
        shape = value.shape
        if shape is None:
            return None
        if self._is_free(value):
            return value
        if len(shape) == rank or (len(shape) == 2 and rank == 2):
            return self._pack(value)
        return None

    def _pack_attention(self, attention: Attention) -> bool:
        parts = [self.packed.get(value) for value in (attention.query, attention.key, attention.value)]
        if any(part is None for part in parts):
            self.report.left.append((attention.node.name or "attention", "its inputs are not token by token"))
            del self.chosen[attention.node]
            return False
        rows = [self._rows(part) for part in parts if part is not None]
        # Once for all groups.
        assert attention.query.dtype is not None
        scale = self.builder.constant(attention.scale, attention.query.dtype.numpy())
        rows[0] = (self.builder.op("Mul", rows[0][0], scale), rows[0][1])
        # What goes in is gathered; what comes out is put together and gathered back.
        self.report.moved += 2 * _FLOAT_BYTES * (sum(heads * each for _, (heads, each) in rows) + 2 * _width(rows))
        if Mask.of(attention.mask) is None:
            out = self._attend_padded(attention, rows)
        else:
            out = self._attend_in_groups(attention, rows)
        heads, width = attention.heads, size(attention.value, 3)
        self._keep(
            attention.node.outputs[0], self.builder.op("Reshape", out, self.builder.constant([1, -1, heads, width]))
        )
        return True

    def _rows(self, part: ir.Value) -> tuple[ir.Value, Sequence[int]]:
        """Return (1, heads, T, head size) as rows, (T, heads * head size), and (heads, head size)."""
        turned = made_by(part, "Transpose")
        if turned is not None and permutation(turned) == [0, 2, 1, 3] and turned.inputs[0] is not None:
            apart = turned.inputs[0]
        else:
            apart = self.builder.op("Transpose", part, perm=[0, 2, 1, 3])
        heads, width = size(part, 1), size(part, 3)
        assert heads is not None
        assert width is not None
        merged = made_by(apart, "Reshape")
        source = merged.inputs[0] if merged is not None else None
        if source is not None and _rank(source) == 3 and size(source, 2) == heads * width:
            apart = source
        return self.builder.op("Reshape", apart, self.builder.constant([-1, heads * width])), (heads, width)

    def _attend_in_groups(self, attention: Attention, rows: Sequence[tuple[ir.Value, Sequence[int]]]) -> ir.Value:
        """Return attention over each text's own tokens, (T, heads * head size)."""
        builder, outs = self.builder, list[ir.Value]()
        for group in self.index.groups:
            parts = [
                self._heads_first(builder.op("Gather", row, group.rows, axis=0), sizes, group.axes)
                for row, sizes in rows
            ]
            out = self._attention(attention, parts, group.seen, short=group.short)
            outs.append(builder.op("Reshape", out, builder.constant([-1, _width(rows)])))
        together = outs[0] if len(outs) == 1 else builder.op("Concat", *outs, axis=0)
        return builder.op("Gather", together, self.index.back, axis=0)

    def _attend_padded(self, attention: Attention, rows: Sequence[tuple[ir.Value, Sequence[int]]]) -> ir.Value:
        """Return attention with a mask of its own, such as relative positions, for which texts keep their places."""
        builder = self.builder
        parts = [self._heads_first(builder.op("Gather", row, self.index.place, axis=0), sizes) for row, sizes in rows]
        out = self._attention(attention, parts, attention.mask)
        return builder.op(
            "Gather", builder.op("Reshape", out, builder.constant([-1, _width(rows)])), self.index.token, axis=0
        )

    def _heads_first(
        self, rows: ir.Value, sizes: Sequence[int], axes: tuple[str, str] = ("texts", "longest")
    ) -> ir.Value:
        builder, (heads, width), (texts, longest) = self.builder, sizes, axes
        apart = builder.op("Reshape", rows, builder.constant([0, 0, heads, width]))
        return builder.op("Transpose", apart, perm=[0, 2, 1, 3], shape=[texts, heads, longest, width])

    def _attention(
        self, attention: Attention, parts: Sequence[ir.Value], mask: ir.Value | None, *, short: bool = False
    ) -> ir.Value:
        settings = {"scale": 1.0, "softcap": attention.softcap, "causal": 0, "short": int(short)}
        return self.builder.op(ATTENTION, *parts, mask, domain=DOMAIN, dtype=attention.query.dtype, **settings)

    # Between the two forms

    def _feed(self, node: ir.Node) -> None:
        """Give a node that is not token by token what it reads, padded again."""
        if self._pool(node):
            return
        for place, value in enumerate(node.inputs):
            if value is not None and value in self.packed and node.op_type != "Shape":
                node.replace_input_with(place, self._unpack(value))

    def _pool(self, node: ir.Node) -> bool:
        """Read a text's first token, or the sum of its tokens, from the packed rows."""
        source = node.inputs[0] if node.inputs else None
        if source is None or source not in self.packed or self._place(source) != 1 or node.domain:
            return False
        builder, output = self.builder, node.outputs[0]
        given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        rows = builder.op("Squeeze", self.packed[source], builder.constant([0]))
        if (
            node.op_type == "Gather"
            and node.attributes.get_int("axis", 0) == 1
            and given is not None
            and given.ndim == 0
        ):
            where = node.inputs[1]
            taken = builder.op("Gather", rows, builder.op("Gather", self.index.place, where, axis=1), axis=0)
            real = builder.op("Gather", self.padding, where, axis=1)
            result = builder.op("Mul", taken, self._ones(real, _rank(source) - 2, source.dtype))
        elif node.op_type == "ReduceSum" and given is not None and given.tolist() == [1] and _rank(source) == 3:
            assert source.dtype is not None
            result = builder.op("MatMul", self.index.membership(source.dtype), rows)
            if node.attributes.get_int("keepdims", 1):
                result = builder.op("Unsqueeze", result, builder.constant([1]))
        else:
            return False
        result.type, result.shape = output.type, output.shape
        self._hand_over(output, result)
        return True

    def _hand_over(self, old: ir.Value, new: ir.Value) -> None:
        if old.is_graph_output():
            name, old.name = old.name, f"{old.name}_padded"
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            new.name = name
        else:
            old.replace_all_uses_with(new)

    def _pack(self, value: ir.Value) -> ir.Value:
        """Return (batch or 1, …, sequence or 1, …) as packed values have it; the sequence is axis 1 or later."""
        builder, shape = self.builder, list(value.shape or ())
        if self.tokens not in shape[1:]:  # one value for all tokens of a text
            return builder.op(
                "Transpose", builder.op("Gather", value, self.index.text, axis=0), perm=[1, 0, *range(2, len(shape))]
            )
        place = shape.index(self.tokens, 1)
        if shape[0] != self.batch:
            return builder.op("Gather", value, self.index.position, axis=place)
        order = [0, place, *(axis for axis in range(1, len(shape)) if axis != place)]
        if place != 1:
            value = builder.op("Transpose", value, perm=order)
        rest = [shape[axis] for axis in order[2:]]
        flat = builder.op("Reshape", value, builder.constant([-1, *rest]))
        rows = builder.op("Unsqueeze", builder.op("Gather", flat, self.index.token, axis=0), builder.constant([0]))
        if place != 1:
            rows = builder.op("Transpose", rows, perm=[order.index(axis) for axis in range(len(order))])
        return rows

    def _unpack(self, value: ir.Value) -> ir.Value:
        """Return a packed value padded again, with zeros."""
        if value in self.unpacked:
            return self.unpacked[value]
        builder, shape, place = self.builder, list(value.shape or ()), self._place(value)
        self.report.padded.append(value.name or "")
        order = [0, place, *(axis for axis in range(1, len(shape)) if axis != place)]
        rows = self.packed[value]
        if place != 1:
            rows = builder.op("Transpose", rows, perm=order)
        full = builder.op("Gather", builder.op("Squeeze", rows, builder.constant([0])), self.index.place, axis=0)
        if value.dtype != ir.DataType.BOOL:
            full = builder.op("Mul", full, self._ones(self.padding, len(shape) - 2, value.dtype))
        if place != 1:
            full = builder.op("Transpose", full, perm=[order.index(axis) for axis in range(len(order))])
        full.type, full.shape = value.type, value.shape
        self.unpacked[value] = full
        return full

    def _ones(self, mask: ir.Value, more: int, dtype: ir.DataType | None) -> ir.Value:
        """Return a mask as numbers, with `more` axes behind its own."""
        ones = self.builder.op("Cast", mask, to=dtype, dtype=dtype)
        axes = [_rank(mask) + axis for axis in range(more)]
        return self.builder.op("Unsqueeze", ones, self.builder.constant(axes)) if axes else ones

    def _keep(self, old: ir.Value, new: ir.Value) -> None:
        new.type = old.type
        assert old.shape is not None
        shape = list(old.shape)
        place = self._place(old)
        new.shape = ir.Shape(
            [1 if axis == 0 else "tokens" if axis == place else each for axis, each in enumerate(shape)]
        )
        self.packed[old] = new

    def _is_rectangle(self, value: ir.Value) -> bool:
        shape = list(value.shape or ())
        return len(shape) > 1 and shape[0] == self.batch and self.tokens in shape[1:]

    def _is_free(self, value: ir.Value) -> bool:
        """Return whether a value is the same for all texts and tokens."""
        return value.shape is not None and not {self.batch, self.tokens} & set(value.shape) and value not in self.packed

    def _place(self, value: ir.Value) -> int:
        """Return the axis of the sequence."""
        shape = list(value.shape or ())
        return shape.index(self.tokens, 1) if self.tokens in shape[1:] else -1


def _is_mask(value: ir.Value | None, padding: ir.Value) -> bool:
    """Return whether a value is the mask, however cast and expanded."""
    sources = {padding}
    cast = padding.producer()
    if cast is not None and cast.op_type == "Cast" and cast.inputs[0] is not None:
        sources.add(cast.inputs[0])
    while value is not None and value not in sources:
        node = value.producer()
        if node is None or node.domain or node.op_type not in ("Cast", "Unsqueeze", "Expand", "Identity"):
            return False
        value = node.inputs[0]
    return value is not None


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else -1


def _width(rows: Sequence[tuple[ir.Value, Sequence[int]]]) -> int:
    """Return the width of what attention gives: heads of queries times head size of values."""
    return rows[0][1][0] * rows[2][1][1]
