"""Rotary position embeddings as one node (Su et al., RoFormer, 2021).

A model computes cosines and sines from the positions in every run. They depend on nothing else, so they become two
tables with a row for every position, which `RotaryEmbedding` reads at `position_ids`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from .nodes import CONTRIB, Builder, constant, initializer, made_by, size

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

POSITIONS = "position_ids"
LARGEST_TABLES = 64 << 20
"""Bytes that the two tables of a model may take; above that cosines and sines are computed in every run."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """What turns the heads of queries or keys by their positions.

    Attributes:
        source: (batch, heads, tokens, head size), not yet turned.
        width: how many channels of each head are turned, the first ones: channel i with channel i + width / 2.
        cos: (batch, tokens, width).
        sin: (batch, tokens, width).
    """

    source: ir.Value
    width: int
    cos: ir.Value
    sin: ir.Value

    @classmethod
    def behind(cls, value: ir.Value) -> Rotation | None:
        """Return the rotation that makes `value`, (batch, heads, tokens, head size)."""
        whole = _turned(value)
        if whole is not None:
            return whole
        # The last channels of a head may be left as they are.
        joined = made_by(value, "Concat")
        if joined is None or len(joined.inputs) != 2 or joined.attributes.get_int("axis", 0) not in (-1, 3):
            return None
        part = _turned(joined.inputs[0])
        if part is None:
            return None
        first, rest = _slice(part.source), _slice(joined.inputs[1])
        if first is None or rest is None or first[0] is not rest[0]:
            return None
        if first[1:] != (0, part.width) or rest[1] != part.width or rest[2] < (size(first[0], 3) or 0):
            return None
        return cls(first[0], part.width, part.cos, part.sin)


class Tables:
    """The tables of a graph, each made once.

    Args:
        model: the graph.
        positions: how many rows, None if the model does not say.
    """

    def __init__(self, model: ir.Model, positions: int | None) -> None:
        self._graph = model.graph
        self._rows = positions
        self._made: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value] | str] = {}

    def of(self, rotation: Rotation) -> tuple[ir.Value, ir.Value] | str:
        """Return the cosines and sines as initializers, (positions, width / 2), or why there are none."""
        key = rotation.cos, rotation.sin
        if key not in self._made:
            self._made[key] = self._make(rotation)
        return self._made[key]

    def _make(self, rotation: Rotation) -> tuple[ir.Value, ir.Value] | str:
        if self._rows is None:
            return "the model's configuration does not say how many positions there are"
        if 4 * self._rows * rotation.width > LARGEST_TABLES:
            return f"tables for {self._rows} positions would take more than {LARGEST_TABLES >> 20} MiB"
        computed = self._compute(rotation)
        if computed is None:
            return "its angles do not follow from the positions alone"
        half = rotation.width // 2
        if any((table[:, :half] != table[:, half:]).any() for table in computed):
            return "it does not turn the first half of the channels with the second"
        cos, sin = (
            initializer(self._graph, f"rotary.{name}", table[:, :half])
            for name, table in zip(("cos", "sin"), computed, strict=True)
        )
        return cos, sin

    def _compute(self, rotation: Rotation) -> list[Array] | None:
        """Return cosines and sines of every position, (positions, width), None if they are not a matter of each alone.

        Some models choose their frequencies by the longest position of a run: the first positions alone must give the
        same as among all.
        """
        assert self._rows is not None
        whole = _evaluate(self._graph, rotation, np.arange(self._rows))
        few = min(8, self._rows)
        first = _evaluate(self._graph, rotation, np.arange(few))
        if whole is None or first is None:
            return None
        alike = all(np.array_equal(table[:few], part) for table, part in zip(whole, first, strict=True))
        shaped = all(table.shape == (self._rows, rotation.width) for table in whole)
        return whole if alike and shaped else None


def rotate(builder: Builder, flat: ir.Value, rotation: Rotation, tables: tuple[ir.Value, ir.Value]) -> ir.Value:
    """Return `flat`, (batch, tokens, heads * head size) of the rotation's source, turned.

    Args:
        builder: where to put the node.
        flat: the heads side by side.
        rotation: what was there.
        tables: the cosines and sines.
    """
    heads, head_size = size(rotation.source, 1), size(rotation.source, 3)
    positions = next(value for value in builder.graph.inputs if value.name == POSITIONS)
    width = 0 if rotation.width == head_size else rotation.width
    return builder.op(
        "RotaryEmbedding",
        flat,
        positions,
        *tables,
        domain=CONTRIB,
        shape=flat.shape,
        num_heads=heads,
        rotary_embedding_dim=width,
    )


def _turned(value: ir.Value | None) -> Rotation | None:
    """Match x * cos + (-x2, x1) * sin, where x1 and x2 are the halves of x."""
    total = made_by(value, "Add")
    products = [made_by(part, "Mul") for part in total.inputs] if total is not None else []
    for straight, crossed in (products, products[::-1]) if len(products) == 2 else ():
        if straight is None or crossed is None:
            continue
        for swapped, sin in (crossed.inputs, crossed.inputs[::-1]):
            source = _source(swapped)
            if source is None or source not in straight.inputs:
                continue
            cos = straight.inputs[1 - straight.inputs.index(source)]
            tables = _per_token(cos), _per_token(sin)
            width = size(source, 3)
            if tables[0] is not None and tables[1] is not None and width is not None:
                return Rotation(source, width, tables[0], tables[1])
    return None


def _source(value: ir.Value | None) -> ir.Value | None:
    """Return x of (-x2, x1)."""
    joined = made_by(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or joined.attributes.get_int("axis", 0) not in (-1, 3):
        return None
    negative = made_by(joined.inputs[0], "Neg")
    second, first = _slice(negative.inputs[0]) if negative is not None else None, _slice(joined.inputs[1])
    if first is None or second is None or first[0] is not second[0]:
        return None
    width = size(first[0], 3)
    if width is None or width % 2 or first[1:] != (0, width // 2) or second[1] != width // 2 or second[2] < width:
        return None
    return first[0]


def _slice(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """Return source, begin and end of a slice of the last of four axes."""
    node = made_by(value, "Slice")
    if node is None or node.inputs[0] is None:
        return None
    bounds = [constant(bound) for bound in node.inputs[1:]]
    if len(bounds) < 3 or any(bound is None or bound.size != 1 for bound in bounds):
        return None
    begin, end, axis, *step = (int(bound.reshape(())) for bound in bounds if bound is not None)
    if axis not in (-1, 3) or step not in ([], [1]):
        return None
    return node.inputs[0], begin, end


def _per_token(value: ir.Value | None) -> ir.Value | None:
    """Return (batch, tokens, width) behind (batch, 1, tokens, width)."""
    node = made_by(value, "Unsqueeze")
    axes = constant(node.inputs[1]) if node is not None else None
    return node.inputs[0] if node is not None and axes is not None and axes.tolist() == [1] else None


def _evaluate(graph: ir.Graph, rotation: Rotation, positions: Array) -> list[Array] | None:
    """Run the part of the graph that makes cosines and sines, in ONNX Runtime; None if it reads other inputs."""
    from onnxruntime import InferenceSession, SessionOptions  # pyright: ignore[reportAttributeAccessIssue]

    source = next((value for value in graph.inputs if value.name == POSITIONS), None)
    if source is None:
        return None
    try:
        part = ir.convenience.extract(graph, [source], [rotation.cos, rotation.sin])
    except ValueError:
        return None
    proto = ir.to_proto(ir.Model(part, ir_version=10))
    del proto.graph.value_info[:]
    options = SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {POSITIONS: positions[None].astype(np.int64)})
    return [np.asarray(output)[0] for output in outputs]
