"""Fused operators: what one kernel of the engine does in place of several nodes."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from onnx_ir.passes.common import RemoveUnusedNodesPass

from .attention import attentions
from .decoder import group_queries
from .nodes import CONTRIB, Builder, constant, nodes_of, replace

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

_KINDS = {
    "rotary": ("RotaryEmbedding",),
    "norm": (
        "LayerNormalization",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    ),
    "gelu": ("BiasGelu", "FastGelu", "Gelu", "QuickGelu"),
}


@dataclass(slots=True)
class Fusion:
    """What was found.

    Attributes:
        counts: how many there are of each kind of fused operator.
        left: (name, reason) of what is computed by several nodes.
    """

    counts: dict[str, int] = field(default_factory=dict[str, int])
    left: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


def fuse_for_onnxruntime(model: ir.Model, *, positions: int | None = None) -> Fusion:
    """Put ONNX Runtime's fused operators into the graph, in place.

    Args:
        model: a graph whose attention is `llmopt.Attention`.
        positions: how many positions the model knows.
    """
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime as fuse

    total = len(attentions(model))
    lowered = group_queries(model, positions=positions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        logging.getLogger("onnx_ir").setLevel(logging.ERROR)
        fuse(model, "cpu")
    _split_skip_norms(model)
    operators = Counter(node.op_type for node in model.graph.all_nodes())
    counts = {"attention": total, "group_query_attention": lowered.attentions}
    counts |= {kind: sum(operators[name] for name in names) for kind, names in _KINDS.items()}
    return Fusion(counts, lowered.left + _unfused(model, counts))


def _unfused(model: ir.Model, counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Name what looks like a pattern that has a kernel, and is still spelled out."""
    found: list[tuple[str, str]] = []
    for node in model.graph.all_nodes():
        if node.op_type == "ReduceMean" and not node.domain:
            found.append((f"norm {len(found)}", "its arithmetic is not that of a norm that ONNX Runtime has"))
    reason = "its arithmetic is not that of a GELU that was recognized"
    gelus = [node for node in model.graph.all_nodes() if node.op_type == "Erf" or _is_cube(node)]
    found += [
        (f"gelu {place}", "its arithmetic is not that of a GELU that was recognized") for place in range(len(gelus))
    ]
    if any(node.op_type == "Cos" for node in model.graph.all_nodes()):
        reason = "cosines and sines are computed in every run"
        found.append(("rotary embedding", reason if counts["rotary"] else f"it was not recognized: {reason}"))
    return found


def _is_cube(node: ir.Node) -> bool:
    exponent = constant(node.inputs[1]) if node.op_type == "Pow" else None
    return exponent is not None and exponent.size == 1 and float(exponent.reshape(())) == 3


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
