"""What a graph can know beforehand, and what it holds twice.

Constants are folded by onnxscript's folder, under a limit of ours: a constant that is larger than what it was made
from makes a file larger for the sake of a node. Duplicates of large weights are found by their bytes, read only where
another has the same type and shape.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    LiftSubgraphInitializersToMainGraphPass,
    NameFixPass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)

from .attention import DOMAIN
from .nodes import replace

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LIMIT = 4096
"""Bytes that a folded constant may have, or as many as the constants that it replaces."""

_ROUNDS = 8
_KEPT = frozenset({"ConstantOfShape", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
"""The first is the smallest way to write its output; the others tell an engine which numbers it may compute with."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large a graph is: nodes, inner graphs included, and bytes of constants."""

    nodes: int
    nbytes: int

    @classmethod
    def of(cls, model: ir.Model) -> Size:
        """Measure a graph; a constant in a node's attribute counts as well."""
        nbytes = sum(tensor.nbytes for graph in model.graphs() for tensor in _constants(graph))
        return cls(sum(1 for _ in model.graph.all_nodes()), nbytes)

    def metrics(self, after: Size) -> dict[str, float]:
        """Return what a pass reports that has made `self` into `after`."""
        return {
            "nodes_before_count": self.nodes,
            "nodes_after_count": after.nodes,
            "constants_saved_bytes": self.nbytes - after.nbytes,
        }


def fold(model: ir.Model, limit: int = LIMIT) -> None:
    """Fold constants and shapes, drop what nothing reads, and keep one of what is there twice.

    Args:
        model: changed in place; its inputs and outputs stay.
        limit: bytes that a folded constant may have where it replaces less.
    """
    with quiet():
        keep_opsets = dict(model.opset_imports)
        InlinePass()(model)
        for _ in range(_ROUNDS):
            before = _fingerprint(model)
            _fold_constants(model, limit)
            drop_identities(model)
            LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            LiftSubgraphInitializersToMainGraphPass()(model)
            RemoveUnusedNodesPass()(model)
            merge_duplicates(model.graph)
            share_transposed(model)
            CommonSubexpressionEliminationPass()(model)
            if _fingerprint(model) == before:
                break
        tidy(model)
        if DOMAIN in keep_opsets:  # its nodes may be gone, and a later pass may make new ones
            model.opset_imports.setdefault(DOMAIN, keep_opsets[DOMAIN])


def tidy(model: ir.Model) -> None:
    """Drop what nothing reads, functions and imports included, and give every value a name of its own."""
    RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)
    RemoveUnusedOpsetsPass()(model)
    NameFixPass()(model)


def drop_identities(model: ir.Model) -> None:
    """Have what reads an Identity read its input; the outputs of a graph keep nodes and names of their own.

    onnx_ir's pass of that purpose makes one value two outputs, and an inner graph return what is not its own.
    """
    for node in [node for node in model.graph.all_nodes() if (node.op_type, node.domain) == ("Identity", "")]:
        source, output = node.inputs[0], node.outputs[0]
        if source is None or node.graph is None:
            continue
        if output.is_graph_output():
            maker = source.producer()
            if maker is None or maker.graph is not node.graph or source.is_graph_output():
                continue
        replace(output, source)
        node.graph.remove(node, safe=True)


def merge_duplicates(graph: ir.Graph) -> None:
    """Keep one of the initializers that have the same type, shape and bytes, graph inputs and outputs apart."""
    alike: defaultdict[Any, list[ir.Value]] = defaultdict(list)
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and not value.is_graph_input() and not value.is_graph_output():
            alike[tensor.dtype, tuple(tensor.shape)].append(value)
    for (dtype, _), values in alike.items():
        if len(values) < 2 or dtype == ir.DataType.STRING:
            continue
        first: dict[bytes, ir.Value] = {}
        for value in values:
            kept = first.setdefault(_digest(value), value)
            if kept is not value:
                value.replace_all_uses_with(kept)
                graph.initializers.pop(cast("str", value.name))


def share_transposed(model: ir.Model) -> None:
    """Store a tied embedding once: the head's matrix is the embedding's, transposed, as the tracer writes it twice.

    ONNX Runtime transposes it again when it loads the graph, not at every run.
    """
    first = [node.inputs[0] for node in model.graph if (node.op_type, node.domain) == ("Gather", "")]
    tables = dict.fromkeys(value for value in first if value is not None and value.is_initializer())
    for node in list(model.graph):
        matrix = node.inputs[1] if node.op_type == "MatMul" else None
        if matrix is None or not matrix.is_initializer() or matrix.const_value is None or matrix in tables:
            continue
        for table in tables:
            tensor = table.const_value
            if tensor is None or list(tensor.shape) != list(matrix.const_value.shape)[::-1]:
                continue
            if np.array_equal(tensor.numpy(), matrix.const_value.numpy().T):
                transpose = ir.node("Transpose", [table], attributes={"perm": [1, 0]})
                transpose.outputs[0].type, transpose.outputs[0].shape = matrix.type, matrix.shape
                model.graph.insert_before(node, transpose)
                node.replace_input_with(1, transpose.outputs[0])
                if not matrix.uses() and not matrix.is_graph_input():
                    model.graph.initializers.pop(cast("str", matrix.name))
                break


@contextmanager
def quiet() -> Iterator[None]:
    """Keep to themselves the libraries' warnings about what they leave alone, and numpy's about 0 and NaN."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with np.errstate(all="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _fold_constants(model: ir.Model, limit: int) -> None:
    from onnxscript.optimizer import FOLDED_FROM_KEY
    from onnxscript.optimizer._constant_folding import FoldConstantsPass

    unlimited = 1 << 62  # the limit is ours, in bytes and known before anything is computed
    FoldConstantsPass(
        shape_inference=True,
        input_size_limit=unlimited,
        output_size_limit=unlimited,
        should_fold=lambda node: None if _is_worth_it(node, limit) else False,
    )(model)
    for graph in model.graphs():
        for value in (*graph.initializers.values(), *(value for node in graph for value in node.outputs)):
            value.metadata_props.pop(FOLDED_FROM_KEY, None)
            value.meta.pop(FOLDED_FROM_KEY, None)


def _is_worth_it(node: ir.Node, limit: int) -> bool:
    """Return whether the outputs of a node with constant inputs are small, or no larger than what goes with it."""
    if node.op_type in _KEPT or node.domain:
        return False
    made = 0
    for value in node.outputs:
        shape, dtype = value.shape, value.dtype
        if shape is None or dtype is None or not shape.is_static():
            return False
        made += math.ceil(prod(cast("tuple[int, ...]", shape.dims)) * dtype.itemsize)
    gone = {value for value in node.inputs if value is not None and len(value.consumers()) == 1}
    return made <= max(limit, sum(value.const_value.nbytes for value in gone if value.const_value is not None))


def _digest(value: ir.Value) -> bytes:
    assert value.const_value is not None
    return hashlib.sha256(value.const_value.tobytes()).digest()


def _fingerprint(model: ir.Model) -> tuple[int, int, int]:
    graphs = list(model.graphs())
    edges = sum(len(node.inputs) for graph in graphs for node in graph)
    return sum(len(graph) for graph in graphs), edges, sum(len(graph.initializers) for graph in graphs)


def _constants(graph: ir.Graph) -> Iterable[ir.TensorProtocol]:
    for value in graph.initializers.values():
        if value.const_value is not None:
            yield value.const_value
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                yield attribute.as_tensor()
