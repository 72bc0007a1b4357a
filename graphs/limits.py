"""Whether an ONNX file may be opened at all: what it would cost to read and to run, found without reading it whole.

The message is walked in its wire format, as protobuf's "Encoding" describes it: a field is a varint
`number << 3 | type`, then a varint (type 0), 8 bytes (1), a length and so many bytes (2) or 4 bytes (5). Two bytes are
enough for a node, for which a library takes two thousand. A function that calls another twice, which does the same,
is a graph of a thousand million nodes by the thirtieth. Numbers of fields are those of onnx.proto.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from ..core.errors import LlmoptError

MAX_MESSAGES = 3_000_000
"""Nodes, tensors, attributes, names and whatever else a graph consists of."""

MAX_NODES = 400_000
MAX_EVALUATIONS = 20_000_000
"""Nodes, those of a loop counted each time it repeats: the engine evaluates some million in a second."""

_MAX_STRUCTURE = 256 << 20
_MAX_SMALL = 64 << 10
_MAX_NESTING = 16
_MAX_DIMENSIONS = 64
_MAX_TYPES = 12
_INT64 = 7
_WEIGHTS = frozenset({4, 5, 9, 10})
"""Fields of a TensorProto that hold numbers as a library keeps them."""

_STRING = 8
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16}
_BITS |= dict.fromkeys((17, 18, 19, 20, 24), 8) | dict.fromkeys((21, 22, 23), 4) | dict.fromkeys((25, 26), 2)
"""What an element takes in raw data, by the number of its type."""


class _Field(NamedTuple):
    """A field of a message: a number, or where its bytes lie."""

    number: int
    value: int
    start: int
    stop: int


class _Refused(Exception):  # noqa: N818  (no error of the program)
    """Why a graph is not opened."""


class _NoMessageError(_Refused):
    """Bytes are no message of protobuf."""


def check_graph_file(path: Path) -> None:
    """Refuse an ONNX file that is damaged, or would take far more time or memory than a model does.

    Weights inside the file are not looked at.

    Raises:
        LlmoptError: it says what is wrong, or which limit is passed.
    """
    try:
        _walk(path)
    except _Refused as refused:
        raise LlmoptError(
            f"`{path.name}` is damaged", where=f"{path}\n{refused}", hint="fetch or export the graph again"
        ) from None


def _walk(path: Path) -> None:
    if not path.is_file() or not path.stat().st_size:
        raise _Refused("it is empty")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data).model()


@dataclass(slots=True)
class _Held:
    """What a TensorProto holds: elements by its shape, bytes of raw data and of other numbers, or none of both."""

    elements: int = 1
    raw: int | None = None
    others: int = 0
    outside: bool = False

    def add(self, field: _Field) -> None:
        """Look at a field: 4, 5, 6, 7, 10, 11 numbers, 9 raw data, 14 whether all that lies outside the file."""
        if field.number == 9:
            self.raw = field.stop - field.start
        elif field.number in {4, 5, 6, 7, 10, 11}:
            self.others += max(1, field.stop - field.start)
        elif field.number == 14:
            self.outside = field.value == 1

    def check(self, name: str, kind: int) -> None:
        """Refuse a shape that says something else than the numbers, which outside raw data take half a byte or more."""
        if self.outside or kind == _STRING:
            return
        exact = None if self.raw is None or kind not in _BITS else (self.elements * _BITS[kind] + 7) // 8
        if (exact is not None and exact != self.raw) or (self.raw is None and self.elements > 2 * self.others):
            given = self.others if self.raw is None else self.raw
            count = min(self.elements, 1 << 64)  # Python prints no number of thousands of digits
            raise _Refused(f"tensor `{name[:100]}` has {count} elements by its shape, and {given} bytes of them")


class _Walk:
    """Walks through one file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._messages = self._nodes = self._structure = 0
        self._functions: dict[tuple[str, ...], _Field] = {}
        self._known: dict[tuple[str, ...], int | None] = {}

    def model(self) -> None:
        """Check a ModelProto: 7 graph, 20 training, 25 functions."""
        graphs: list[_Field] = []
        for field in self._fields(0, len(self._data)):
            if field.number == 7:
                graphs.append(field)
            elif field.number == 25:
                self._functions[self._signature(field)] = field
            elif field.number == 20:
                raise _Refused("it holds graphs for training")
            else:
                self._add(field)
        if len(graphs) != 1:
            raise _Refused(f"it holds {len(graphs)} graphs")
        cost = self._graph(graphs[0], {}, 0)
        if cost > MAX_EVALUATIONS:
            raise _Refused(f"a run evaluates more than {MAX_EVALUATIONS} nodes: loops or functions repeat too often")

    def _fields(self, start: int, stop: int) -> Iterator[_Field]:
        data, at = self._data, start
        while at < stop:
            self._messages += 1
            if self._messages > MAX_MESSAGES:
                raise _Refused(f"it consists of more than {MAX_MESSAGES} parts")
            key, at = self._varint(at, stop)
            kind, number = key & 7, key >> 3
            if kind == 0:
                value, at = self._varint(at, stop)
                yield _Field(number, value, at, at)
                continue
            length = {1: 8, 5: 4}.get(kind, -1)
            if kind == 2:
                length, at = self._varint(at, stop)
            if length < 0 or at + length > stop or not number:
                raise _NoMessageError(f"it is no message of protobuf at byte {at}")
            yield _Field(number, int.from_bytes(data[at : at + length], "little") if kind != 2 else 0, at, at + length)
            at += length

    def _varint(self, at: int, stop: int) -> tuple[int, int]:
        value = shift = 0
        while at < stop and shift < 70:
            byte = self._data[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value, at
        raise _NoMessageError(f"it is no message of protobuf at byte {at}")

    def _graph(self, graph: _Field, outer: dict[str, int], depth: int) -> int:
        """Return how many nodes a run of a GraphProto evaluates: 1 node, 5 initializer, 15 sparse initializer."""
        if depth > _MAX_NESTING:
            raise _Refused(f"graphs lie in one another more than {_MAX_NESTING} levels deep")
        nodes: list[_Field] = []
        constants = dict(outer) if depth else outer
        for field in self._fields(graph.start, graph.stop):
            if field.number == 1:
                self._add_node(nodes, field)
            elif field.number == 5:
                name, value = self._tensor(field)
                if value is not None:
                    constants[name] = value
            elif field.number == 15:
                self._sparse(field)
            else:
                self._count(field, messages={11, 12, 13, 14, 16})
        return self._cost(nodes, constants, depth)

    def _cost(self, nodes: list[_Field], constants: dict[str, int], depth: int) -> int:
        return sum(self._node(node, constants, depth) for node in nodes)

    def _add_node(self, nodes: list[_Field], node: _Field) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _Refused(f"it has more than {MAX_NODES} nodes")
        nodes.append(node)

    def _node(self, node: _Field, constants: dict[str, int], depth: int) -> int:
        """Return what a NodeProto costs: 1 input, 2 output, 4 operator, 5 attribute, 7 domain, 8 overload."""
        first: dict[int, str] = {}
        names = {7: "", 4: "", 8: ""}
        inner, values = 0, list[int | None]()
        for field in self._fields(node.start, node.stop):
            self._count(field, messages={9, 10}, weights={5})
            if field.number in {1, 2}:
                first.setdefault(field.number, self._text(field))
            elif field.number == 5:
                cost, value = self._attribute(field, constants, depth)
                inner, values = inner + cost, [*values[:1], value]
            elif field.number in names:
                names[field.number] = self._text(field)
        domain, operator, overload = _domain(names[7]), names[4], names[8]
        if (domain, operator, overload) in self._functions:
            return 1 + inner + self._function((domain, operator, overload), depth)
        if operator == "Constant" and len(values) == 1 and values[0] is not None and 2 in first:
            constants[first[2]] = values[0]
        if operator == "Loop" and not domain:
            return 1 + inner * self._repeats(constants.get(first.get(1, "")))
        return 1 + inner

    def _repeats(self, known: int | None) -> int:
        """Return how often a Loop repeats; one that decides while it runs may do so for ever."""
        if known is None:
            raise _Refused("a Loop has no fixed number of repetitions, so nothing tells whether it ends")
        return max(1, known)

    def _function(self, name: tuple[str, ...], depth: int) -> int:
        """Return what a call of a FunctionProto costs: 7 node; what calls itself is refused."""
        if name not in self._known:
            self._known[name] = None
            if depth > _MAX_NESTING:
                raise _Refused(f"functions call one another more than {_MAX_NESTING} levels deep")
            nodes: list[_Field] = []
            for field in self._fields(self._functions[name].start, self._functions[name].stop):
                if field.number == 7:
                    self._add_node(nodes, field)
                else:
                    self._inner(field, 0)
            self._known[name] = min(self._cost(nodes, {}, depth + 1), MAX_EVALUATIONS + 1)
        cost = self._known[name]
        if cost is None:
            raise _Refused(f"function `{name[1]}` calls itself")
        return cost

    def _attribute(self, attribute: _Field, constants: dict[str, int], depth: int) -> tuple[int, int | None]:
        """Return what the graphs of an AttributeProto cost, and its value if it is one whole number.

        3 i, 5 t, 6 g, 10 tensors, 11 graphs, 22 sparse tensor, 23 sparse tensors.
        """
        cost, values = 0, list[int | None]()
        for field in self._fields(attribute.start, attribute.stop):
            if field.number in {6, 11}:
                cost += self._graph(field, constants, depth + 1)
            elif field.number in {5, 10}:
                values.append(self._tensor(field)[1])
            elif field.number in {22, 23}:
                self._sparse(field)
            elif field.number == 3:
                values.append(_signed(field.value))
            else:
                self._count(field, messages={14, 15})
        return cost, values[0] if len(values) == 1 else None

    def _tensor(self, tensor: _Field) -> tuple[str, int | None]:
        """Return name and value of a TensorProto, the value if it is one whole number.

        1 dims, 2 type, 7 int64, 8 name, 9 raw data, 13 external data, 14 whether the data lie outside, 16 metadata.
        """
        dimensions, name, kind, values = 0, "", 0, list[int]()
        held = _Held()
        for field in self._fields(tensor.start, tensor.stop):
            self._count(field, messages={13, 16}, weights=_WEIGHTS)
            size = field.stop - field.start
            held.add(field)
            if field.number == 1:
                dimensions += max(1, size)
                if dimensions <= 10 * _MAX_DIMENSIONS:
                    held.elements *= prod(self._varints(field))
            elif field.number == 2:
                kind = field.value
            elif field.number == 8:
                name = self._text(field)
            elif field.number == 9 and size == 8:
                values.append(int.from_bytes(self._data[field.start : field.stop], "little", signed=True))
            elif field.number == 7 and size <= 10:
                values.append(_signed(self._varint(field.start, field.stop)[0] if size else field.value))
        if dimensions > 10 * _MAX_DIMENSIONS:  # a varint takes up to ten bytes
            raise _Refused(f"tensor `{name[:100]}` has more than {_MAX_DIMENSIONS} dimensions")
        held.check(name, kind)
        return name, values[0] if kind == _INT64 and len(values) == 1 else None

    def _varints(self, field: _Field) -> Iterator[int]:
        """Yield the numbers of a field that holds one, or several one after another."""
        if field.start == field.stop:
            yield field.value
        at = field.start
        while at < field.stop:
            value, at = self._varint(at, field.stop)
            yield value

    def _sparse(self, tensor: _Field) -> None:
        """Look at a SparseTensorProto: 1 values, 2 indices, both tensors."""
        for field in self._fields(tensor.start, tensor.stop):
            if field.number in {1, 2}:
                self._tensor(field)
            else:
                self._add(field)

    def _count(self, field: _Field, *, messages: AbstractSet[int], weights: AbstractSet[int] = frozenset()) -> None:
        """Count a field: the parts of what is a message, nothing of what is weights, the bytes of others."""
        if field.number in messages:
            self._inner(field, 0)
        elif field.number not in weights:
            self._add(field)

    def _inner(self, field: _Field, depth: int) -> None:
        """Count the parts of a message of any kind: types, shapes, entries of metadata; texts are met among them."""
        self._add(field)
        if field.stop - field.start < 2:
            return
        if depth > _MAX_TYPES and field.stop - field.start > _MAX_SMALL:
            raise _Refused(f"types lie in one another more than {_MAX_TYPES} levels deep")
        if depth > _MAX_TYPES:
            return
        with suppress(_NoMessageError):  # a text
            for part in self._fields(field.start, field.stop):
                self._inner(part, depth + 1)

    def _add(self, field: _Field) -> None:
        """Count the bytes of what a library keeps in objects of its own."""
        self._structure += field.stop - field.start
        if self._structure > _MAX_STRUCTURE:
            raise _Refused(f"its structure takes more than {_MAX_STRUCTURE >> 20} MiB, without weights")

    def _signature(self, function: _Field) -> tuple[str, ...]:
        """Return what a FunctionProto is called by: 10 domain, 1 name, 13 overload."""
        found = {10: "", 1: "", 13: ""}
        for field in self._fields(function.start, function.stop):
            if field.number in found:
                found[field.number] = self._text(field)
        return _domain(found[10]), found[1], found[13]

    def _text(self, field: _Field) -> str:
        if field.stop - field.start > _MAX_SMALL:
            raise _Refused(f"a name takes {field.stop - field.start} bytes")
        return bytes(self._data[field.start : field.stop]).decode("utf-8", "replace")


def _domain(name: str) -> str:
    """Return a domain's name; that of ONNX itself has two."""
    return "" if name == "ai.onnx" else name


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 & 1 else value
