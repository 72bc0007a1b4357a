"""Fused operators: what one kernel of the engine does in place of several nodes."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

from onnx_ir.passes.common import RemoveUnusedNodesPass

from .decoder import Lowering, group_queries
from .nodes import CONTRIB, Builder, nodes_of, replace

if TYPE_CHECKING:
    import onnx_ir as ir


def fuse_for_onnxruntime(model: ir.Model, *, positions: int | None = None) -> Lowering:
    """Put ONNX Runtime's fused operators into the graph, in place.

    Args:
        model: a graph whose attention is `llmopt.Attention`.
        positions: how many positions the model knows.
    """
    report = group_queries(model, positions=positions)
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime as fuse

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        logging.getLogger("onnx_ir").setLevel(logging.ERROR)
        fuse(model, "cpu")
    _split_skip_norms(model)
    return report


def _split_skip_norms(model: ir.Model) -> None:
    """Take SkipLayerNormalization apart: its CPU kernel is many times slower than an Add and a LayerNormalization."""
    for node in nodes_of(model, "SkipLayerNormalization", CONTRIB):
        builder = Builder(node)
        values = list(node.inputs) + [None] * 5
        total = builder.op("Add", values[0], values[1], shape=node.outputs[0].shape)
        if values[4] is not None:
            total = builder.op("Add", total, values[4], shape=node.outputs[0].shape)
        epsilon = node.attributes.get_float("epsilon", 1e-12)
        replace(
            node.outputs[0], builder.op("LayerNormalization", total, values[2], values[3], axis=-1, epsilon=epsilon)
        )
        if len(node.outputs) > 3:
            replace(node.outputs[3], total)
        builder.graph.remove(node, safe=True)
    RemoveUnusedNodesPass()(model)
