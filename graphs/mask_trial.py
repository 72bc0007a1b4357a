"""Whether a value is the mask of the padding, found out by computing it.

Exporters write masks in a dozen ways, forty nodes long some of them, and differently in every version. All of them come
from the `attention_mask` and a few sizes, so the nodes in between are run on small random masks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from .nodes import constant

if TYPE_CHECKING:
    from collections.abc import Mapping

    Array = np.ndarray[Any, Any]

PADDING = "attention_mask"
HIDDEN = -1e4
"""A number that low, added to a score, hides the key."""

_TRIALS = ((2, 5), (3, 7), (1, 4))
"""Batches and lengths."""

_LARGEST = 1 << 16
"""Elements of a constant that a mask may be made with."""


def hides_padding(model: ir.Model, mask: ir.Value, *, seen: bool | None) -> bool:
    """Return whether a mask hides exactly what `attention_mask` says is padding, whatever that says.

    Args:
        model: the graph, with the sizes of its values.
        mask: (batch, 1, queries or 1, keys), or what broadcasts to it.
        seen: what a boolean mask says of a key that is seen; None where the mask is added to the scores.
    """
    padding = next((value for value in model.graph.inputs if value.name == PADDING), None)
    if padding is None or padding.shape is None or len(padding.shape) != 2:
        return False
    found = _nodes_behind(mask)
    if found is None:
        return False
    nodes, leaves = found
    generator = np.random.default_rng(0)
    run = _program(nodes, leaves, mask)
    for batch, length in _TRIALS:
        tokens = generator.integers(0, 2, (batch, length))
        tokens[:, 0] = 1  # what a text of nothing but padding sees is up to the exporter
        sizes = _sizes(model, batch, length)
        feeds = {value.name: _feed(value, tokens, sizes) for value in leaves}
        made = None if any(array is None for array in feeds.values()) else run(feeds)
        if made is None or not _says(made, tokens.astype(bool), seen=seen):
            return False
    return True


def _nodes_behind(value: ir.Value) -> tuple[list[ir.Node], list[ir.Value]] | None:
    """Return the nodes that compute a value, in order, and what they begin with: inputs, and sizes of other values."""
    nodes: set[ir.Node] = set()
    leaves: dict[ir.Value, None] = {}
    stack = [value]
    while stack:
        current = stack.pop()
        node = current.producer()
        if node is None:
            if current.is_graph_input():
                leaves[current] = None
            elif current.const_value is None or current.const_value.size > _LARGEST:
                return None
            continue
        if node.op_type == "Shape" and node.inputs[0] is not None and node.inputs[0].shape is not None:
            leaves[current] = None
            continue
        if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            return None
        if node not in nodes:
            nodes.add(node)
            stack += [each for each in node.inputs if each is not None]
    graph = value.graph
    return None if graph is None else ([node for node in graph if node in nodes], list(leaves))


def _program(nodes: list[ir.Node], leaves: list[ir.Value], output: ir.Value) -> Any:
    """Return a function that runs the nodes: from arrays by name to the output, None where they do not run."""
    import onnx
    import onnxruntime

    constants = {value for node in nodes for value in node.inputs if value is not None and value.is_initializer()}
    assert output.graph is not None
    graph = onnx.helper.make_graph(
        [ir.to_proto(node) for node in nodes],
        "mask",
        [onnx.helper.make_tensor_value_info(str(value.name), _code(value), None) for value in leaves],
        [onnx.helper.make_tensor_value_info(str(output.name), _code(output), None)],
        [_named(value) for value in constants],
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in output.graph.opset_imports.items()]
    program = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1

    def run(feeds: Mapping[str, Array]) -> Array | None:
        try:
            session = onnxruntime.InferenceSession(program.SerializeToString(), options, ["CPUExecutionProvider"])
            return np.asarray(session.run(None, dict(feeds))[0])
        except Exception:  # noqa: BLE001 -- the engine's errors have no common base; what does not run is no mask
            return None

    return run


def _named(value: ir.Value) -> Any:
    array = constant(value)
    assert array is not None
    return ir.to_proto(ir.tensor(array, name=value.name))


def _code(value: ir.Value) -> int:
    return int(value.dtype if value.dtype is not None else ir.DataType.INT64)


def _sizes(model: ir.Model, batch: int, length: int) -> dict[str, int]:
    """Return sizes for the axes of everything that goes in by the token."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        shape = value.shape
        if shape is None or len(shape) != 2:
            continue
        for dimension, size in zip(shape, (batch, length), strict=True):
            if isinstance(dimension, ir.SymbolicDim) and dimension.value is not None:
                sizes[dimension.value] = size
    return sizes


def _feed(leaf: ir.Value, tokens: Array, sizes: Mapping[str, int]) -> Array | None:
    """Return what a leaf holds in a trial: the mask, ones for other inputs, the sizes of a value."""
    node = leaf.producer()
    shape = leaf.shape if node is None else node.inputs[0].shape if node.inputs[0] is not None else None
    known = [size if isinstance(size, int) else size.evaluate(sizes) for size in shape or ()]
    sizes_known = [size for size in known if isinstance(size, int)]
    if len(sizes_known) < len(known):
        return None
    if node is not None:
        begin, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(known))
        return np.array(sizes_known[begin:end], np.int64)
    kind = leaf.dtype.numpy() if leaf.dtype is not None else np.dtype(np.int64)
    return tokens.astype(kind) if leaf.name == PADDING else np.ones(sizes_known, kind)


def _says(made: Array, tokens: Array, *, seen: bool | None) -> bool:
    """Return whether a computed mask hides the padding and nothing else, from every query."""
    batch, length = tokens.shape
    if seen is None:
        plain = bool(((made == 0) | (made <= HIDDEN)).all())
        shown = made == 0
    else:
        plain = made.dtype == np.bool_
        shown = made if seen else ~made
    try:
        full = np.broadcast_to(shown, (batch, 1, length, length))
    except ValueError:
        return False
    return plain and bool((full == tokens[:, None, None, :]).all())
