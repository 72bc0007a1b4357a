"""Where the tokens of a batch lie once its padding is removed, worked out in the graph."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from .nodes import Builder


@dataclass(frozen=True, slots=True)
class Layout:
    """How texts lie in the row and are divided.

    Attributes:
        groups: into how many groups of similar length a batch's texts are divided for attention.
        whole: fill the row of tokens up to a multiple of the batch, so that its length is one of as many as texts may
            have, and seldom new to an engine that compiles for each.
        short: texts of up to this many tokens are one more group, whose attention is spelled out for short texts.
    """

    groups: int
    whole: bool = False
    short: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """Texts of similar length.

    Attributes:
        rows: (texts, longest) into the packed rows.
        seen: (texts, 1, 1, longest) booleans.
        axes: what the graph calls the number of texts, and the longest.
        short: whether they all are short.
    """

    rows: ir.Value
    seen: ir.Value
    axes: tuple[str, str]
    short: bool


class TokenIndex:
    """Where tokens lie, worked out once a batch.

    Attributes:
        token: (T,) number of each real token in the padded batch, then of any others that fill the row.
        text: (T,) the text it belongs to, -1 for those others.
        position: (T,) its place in the text, padding counted.
        place: (batch, sequence) row of each place of the padded batch; any row for padding.
        groups: the texts by length.
        back: (T,) row of each token in what the groups give, one after another; that of a real one for the others.
    """

    def __init__(self, builder: Builder, padding: ir.Value, layout: Layout) -> None:
        self._builder = builder
        first = len(builder.graph)
        kind = ir.DataType.INT64
        b, op = builder, builder.op
        mask = padding if padding.dtype == kind else op("Cast", padding, to=kind, dtype=kind)
        if padding.dtype == kind:
            mask = op("Cast", op("Cast", padding, to=ir.DataType.BOOL, dtype=ir.DataType.BOOL), to=kind, dtype=kind)
        flat = op("Reshape", mask, b.constant([-1]))
        found = op("Squeeze", op("NonZero", flat), b.constant([0]))
        # A batch of nothing but padding keeps one token, so that no operator meets an empty input.
        count = op("Shape", found, dtype=kind)
        needed = op("Max", count, b.constant([1]))
        self._texts = op("Shape", mask, start=0, end=1)
        if layout.whole:
            texts = op("Max", self._texts, b.constant([1]))
            needed = op("Mul", op("Div", op("Sub", op("Add", needed, texts), b.constant([1])), texts), texts)
        spare = op("Sub", needed, count)
        others = op("Range", b.constant(0), op("Squeeze", spare, b.constant([0])), b.constant(1))
        self.token = op("Concat", found, others, axis=0)
        width = op("Shape", mask, start=1, end=2)
        self.text = op("Concat", op("Div", found, width), op("Expand", b.constant([-1]), spare), axis=0)
        self.position = op("Mod", self.token, width)
        before = op("CumSum", flat, b.constant(0))
        row = op("Max", op("Sub", before, b.constant([1])), b.constant([0]))
        self.place = op("Reshape", row, op("Shape", mask))
        lengths = op("ReduceSum", mask, b.constant([1]), keepdims=0)
        starts = op("CumSum", lengths, b.constant(0), exclusive=1)
        self.groups, self.back = self._divide(lengths, starts, layout)
        self._memberships: dict[ir.DataType, ir.Value] = {}
        nodes = list(builder.graph)
        self._nodes = set(nodes[first - 1 :])

    def owns(self, node: ir.Node) -> bool:
        """Return whether the node computes the index."""
        return node in self._nodes

    def _divide(self, lengths: ir.Value, starts: ir.Value, layout: Layout) -> tuple[list[Group], ir.Value]:
        """Sort the texts by length and cut them into groups: the short ones, and the others by equal number."""
        b, op, kind = self._builder, self._builder.op, ir.DataType.INT64
        cuts = self._cuts(lengths, layout)
        order = None
        if len(cuts) > 2:
            order = b.ops("TopK", lengths, self._texts, outputs=2, axis=0, largest=0)[1]
            order.dtype = kind
        last = op("Sub", op("Shape", self.token), b.constant([1]))
        groups: list[Group] = []
        rows: list[ir.Value] = []
        real: list[ir.Value] = []
        for number, (first, end) in enumerate(pairwise(cuts)):
            own, begin = lengths, starts
            if order is not None:
                members = op("Slice", order, first, end, b.constant([0]))
                own, begin = op("Gather", lengths, members, axis=0), op("Gather", starts, members, axis=0)
            # The longest, 1 for an empty group.
            longest = op("ReduceMax", op("Concat", own, b.constant([1]), axis=0), b.constant([0]), keepdims=0)
            steps = op("Range", b.constant(0), longest, b.constant(1))
            ends = op("Unsqueeze", own, b.constant([1]))
            seen = op("Less", steps, ends, dtype=ir.DataType.BOOL)
            inside = op("Max", op("Min", steps, op("Sub", ends, b.constant([1]))), b.constant([0]))
            place = op("Min", op("Add", op("Unsqueeze", begin, b.constant([1])), inside), last)
            axes = f"texts.{number}", f"longest.{number}"
            seen = op("Unsqueeze", seen, b.constant([1, 2]), shape=[axes[0], 1, 1, axes[1]])
            groups.append(Group(place, seen, axes, short=bool(layout.short) and number == 0))
            rows.append(op("Reshape", place, b.constant([-1])))
            real.append(op("Reshape", seen, b.constant([-1])))
        every_row, every_real = (
            parts[0] if len(parts) == 1 else op("Concat", *parts, axis=0) for parts in (rows, real)
        )
        where = op("Squeeze", op("NonZero", every_real, dtype=kind), b.constant([0]))
        target = op("Gather", every_row, where, axis=0)
        real_row = op("ReduceMax", op("Concat", where, b.constant([0]), axis=0), b.constant([0]))
        rows_of_others = op("Expand", real_row, op("Shape", self.token))
        return groups, op("ScatterElements", rows_of_others, target, where, axis=0)

    def _cuts(self, lengths: ir.Value, layout: Layout) -> list[ir.Value]:
        """Return where each group of the sorted texts begins, and the end of the last: (1,) each."""
        b, op, kind = self._builder, self._builder.op, ir.DataType.INT64
        cuts, begin, others = [b.constant([0])], None, self._texts
        if layout.short:
            short = op("LessOrEqual", lengths, b.constant(layout.short), dtype=ir.DataType.BOOL)
            begin = op("ReduceSum", op("Cast", short, to=kind, dtype=kind), b.constant([0]), keepdims=1)
            cuts.append(begin)
            others = op("Sub", self._texts, begin)
        for each in range(1, layout.groups + 1):
            end = op("Div", op("Mul", others, b.constant([each])), b.constant([layout.groups]))
            cuts.append(end if begin is None else op("Add", begin, end))
        return cuts

    def membership(self, dtype: ir.DataType) -> ir.Value:
        """Return (batch, T) numbers, 1 where a token belongs to a text."""
        if dtype not in self._memberships:
            b, op = self._builder, self._builder.op
            texts = op("Range", b.constant(0), op("Squeeze", self._texts, b.constant([0])), b.constant(1))
            same = op("Equal", op("Unsqueeze", texts, b.constant([1])), self.text, dtype=ir.DataType.BOOL)
            self._memberships[dtype] = op("Cast", same, to=dtype, dtype=dtype)
        return self._memberships[dtype]
