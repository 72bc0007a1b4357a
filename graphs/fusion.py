"""Fused operators: what one kernel of the engine does in place of several nodes."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..core.errors import LlmoptError
from .attention import attentions
from .decoder import Padding, group_queries
from .folding import quiet
from .gelu import fuse_tanh_gelus
from .heads import attend_with_heads
from .kernels import CUDA, PUBLISHED, can_be_asked, without_cuda_kernel
from .nodes import CONTRIB, Builder, constant, made_by, nodes_of, permutation, replace

if TYPE_CHECKING:
    from collections.abc import Mapping

_HEADS = [0, 2, 1, 3]
"""Turns tokens by heads into heads by tokens, and back."""

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
        matched: every attention that is one node now, and what it does.
        left: (name, reason) of what is computed by several nodes.
    """

    counts: dict[str, int] = field(default_factory=dict[str, int])
    matched: list[str] = field(default_factory=list[str])
    left: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


def fuse_for_onnxruntime(model: ir.Model, *, positions: int | None = None, padding: Padding = "any") -> Fusion:
    """Put ONNX Runtime's fused operators into the graph, in place.

    Args:
        model: a graph whose attention is `llmopt.Attention`.
        positions: how many positions the model knows.
        padding: where it may stand in a language model's batch.
    """
    from transformers.exporters import onnxruntime_fusions as theirs

    total = len(attentions(model))
    fuse_tanh_gelus(model)
    lowered = group_queries(model, positions=positions, padding=padding)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        logging.getLogger("onnx_ir").setLevel(logging.ERROR)
        for step, providers in theirs._STEPS:  # pyright: ignore[reportPrivateUsage]
            # Three products of a decoder's few tokens are faster than one, which has to be taken apart again.
            packs = step is theirs._pack_sibling_matmuls  # pyright: ignore[reportPrivateUsage]
            if (providers is None or "cpu" in providers) and not (packs and lowered.attentions):
                step(model)
    _split_skip_norms(model)
    _untranspose(model)
    operators = Counter(node.op_type for node in model.graph.all_nodes())
    counts = {"attention": total, "group_query_attention": lowered.attentions}
    counts |= {kind: sum(operators[name] for name in names) for kind, names in _KINDS.items()}
    counts["rotary"] += lowered.inside
    left = lowered.left + _spelled_out(model, lowered.left) + _unfused(model, counts)
    return Fusion(counts, _matched(model), left)


def fuse_for_cuda(model: ir.Model) -> Fusion:
    """Put the fused operators into the graph that ONNX Runtime has CUDA kernels for, in place.

    An encoder's attention becomes MultiHeadAttention. Attention over a cache is left to be spelled out: the CUDA kernel
    of GroupQueryAttention is not documented to take a bias, which padding needs.

    Args:
        model: a graph whose attention is `llmopt.Attention`.

    Raises:
        LlmoptError: an operator was put in that has no kernel, or is not known to have one.
    """
    from transformers.exporters import onnxruntime_fusions as theirs

    total = len(attentions(model))
    fuse_tanh_gelus(model)
    lowered, left = attend_with_heads(model)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step, providers in theirs._STEPS:  # pyright: ignore[reportPrivateUsage]
            # Those for CUDA alone make operators that no CPU computes, and so nothing could be verified.
            if providers is None or step is theirs._untranspose_batch_matmuls:  # pyright: ignore[reportPrivateUsage]
                step(model)
    if unknown := without_cuda_kernel(model):
        raise LlmoptError(
            f"no CUDA kernel is known for {', '.join(unknown)}",
            where="the installed ONNX Runtime" if can_be_asked(CUDA) else PUBLISHED,
            hint="leave `fuse` out for the GPU",
        )
    operators = Counter(node.op_type for node in model.graph.all_nodes())
    counts = {"attention": total, "multi_head_attention": lowered}
    counts |= {kind: sum(operators[name] for name in names) for kind, names in _KINDS.items()}
    return Fusion(counts, _matched(model), left + _unfused(model, counts))


def _matched(model: ir.Model) -> list[str]:
    """Name every attention that is one node, with what is rotated in front of it or by it."""
    found: list[str] = []
    for node in model.graph:
        if node.op_type not in ("GroupQueryAttention", "MultiHeadAttention"):
            continue
        rotated = [made_by(value, "RotaryEmbedding", CONTRIB) for value in node.inputs[:2]]
        turned = "rotary inside" if node.attributes.get_int("do_rotary", 0) else "rotary" if any(rotated) else ""
        found.append(f"attention {len(found)}: {', '.join(filter(None, (node.op_type, turned)))}")
    return found


def _spelled_out(model: ir.Model, known: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Name the attentions that are still our own, and of which no reason is known."""
    count = len(attentions(model)) - sum(name.startswith("attention") for name, _ in known)
    reason = "it has no cache, as GroupQueryAttention needs: it is written with products and a softmax"
    return [(f"attention {place}", reason) for place in range(count)]


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


def _untranspose(model: ir.Model) -> None:
    """Let a norm or a split of heads work on them as they came, where they are turned in front and back behind it."""
    for node in [*model.graph]:
        if node.op_type not in (*_KINDS["norm"][:3], "Split") or not _is_over_last(node):
            continue
        turn = made_by(node.inputs[0], "Transpose")
        users = [user for value in node.outputs for user in value.consumers()]
        kept = any(value.is_graph_output() for value in node.outputs)
        if turn is None or permutation(turn) != _HEADS or len(turn.outputs[0].uses()) != 1 or kept or not users:
            continue
        if any(user.op_type != "Transpose" or permutation(user) != _HEADS for user in users):
            continue
        node.replace_input_with(0, turn.inputs[0])
        for value in node.outputs:
            value.shape = None if value.shape is None else ir.Shape([value.shape[axis] for axis in _HEADS])
        for user in users:
            assert user.inputs[0] is not None
            replace(user.outputs[0], user.inputs[0])
    RemoveUnusedNodesPass()(model)


def _is_over_last(node: ir.Node) -> bool:
    rank = len(node.inputs[0].shape or ()) if node.inputs[0] is not None else 0
    return node.attributes.get_int("axis", 0 if node.op_type == "Split" else -1) in (-1, rank - 1)


def _is_cube(node: ir.Node) -> bool:
    exponent = constant(node.inputs[1]) if node.op_type == "Pow" else None
    return exponent is not None and exponent.size == 1 and float(exponent.reshape(())) == 3


def _split_skip_norms(model: ir.Model) -> None:
    """Take the sum out of norms again: their CPU kernels are slower than an Add and a norm, one of them many times."""
    for name, norm in (
        ("SkipLayerNormalization", "LayerNormalization"),
        ("SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization"),
    ):
        for node in nodes_of(model, name, CONTRIB):
            _split_skip_norm(node, norm)
    RemoveUnusedNodesPass()(model)


def _split_skip_norm(node: ir.Node, norm: str) -> None:
    builder, shape = Builder(node), node.outputs[0].shape
    first, second, gamma, *optional = [*node.inputs, None, None]
    # LayerNormalization alone has a beta; both may have a bias, which is part of the sum.
    beta, bias = optional[:2] if norm == "LayerNormalization" else (None, optional[0])
    total = builder.op("Add", first, second, shape=shape)
    if bias is not None:
        total = builder.op("Add", total, bias, shape=shape)
    scales = [gamma] if beta is None else [gamma, beta]
    epsilon = node.attributes.get_float("epsilon", 1e-12)
    replace(node.outputs[0], builder.op(norm, total, *scales, axis=-1, epsilon=epsilon))
    if len(node.outputs) > 3:
        replace(node.outputs[3], total)
    builder.graph.remove(node, safe=True)
