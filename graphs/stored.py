"""A graph set down on its way, nodes of our own included, to go on from it later."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from pathlib import Path

GRAPH, DATA = "graph.onnx", "graph.data"

_SMALL = 1024
"""Constants of up to so many elements are read with the graph."""


def write_graph(model: ir.Model, folder: Path) -> None:
    """Write a graph and its weights, which need not be in memory; the graph stays as it is."""
    ir.save(model, folder / GRAPH, external_data=DATA)


def read_graph(folder: Path) -> ir.Model:
    """Return what `write_graph` wrote, its large weights left on disk."""
    model = ir.load(folder / GRAPH)
    read_small(model)
    return model


def read_small(model: ir.Model) -> None:
    """Read small constants that lie outside the graph's file: shapes are worked out from such."""
    for value in [value for graph in model.graphs() for value in graph.initializers.values()]:
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.size <= _SMALL:
            value.const_value = ir.tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=value.name)


def weight_bytes(model: ir.Model) -> int:
    """Return what the weights of a graph take."""
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
