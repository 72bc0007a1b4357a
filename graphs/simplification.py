"""Nodes that change nothing, and chains that one node can do.

The rules are onnxscript's where it has them. Its shape rules know one unknown size; ours also know sizes that are
copied from the input at the same place, which is what every split of heads has.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .folding import drop_identities, quiet, tidy
from .nodes import Builder, constant, made_by, nodes_of, replace

_ROUNDS = 8
_KIND = ir.DataType
_HOLDS: dict[ir.DataType, frozenset[ir.DataType]] = {
    _KIND.INT64: frozenset({_KIND.BOOL, _KIND.INT8, _KIND.UINT8, _KIND.INT16, _KIND.UINT16, _KIND.INT32, _KIND.UINT32}),
    _KIND.INT32: frozenset({_KIND.BOOL, _KIND.INT8, _KIND.UINT8, _KIND.INT16, _KIND.UINT16}),
    _KIND.FLOAT: frozenset(
        {_KIND.BOOL, _KIND.FLOAT16, _KIND.BFLOAT16, _KIND.INT8, _KIND.UINT8, _KIND.INT16, _KIND.UINT16}
    ),
    _KIND.DOUBLE: frozenset(
        {_KIND.BOOL, _KIND.FLOAT, _KIND.FLOAT16, _KIND.BFLOAT16, _KIND.INT8, _KIND.UINT8, _KIND.INT16, _KIND.INT32}
    ),
}
"""Types every number of which the key has as well: a cast to the key and on is a cast."""


def simplify(model: ir.Model) -> None:
    """Take out what changes nothing, and join chains of casts, reshapes and transposes, in place."""
    from onnxscript.rewriter import RewritePass
    from onnxscript.rewriter.rules import common

    rules = [
        common.no_op_transpose_rule,
        common.transpose_transpose_rule,
        common.no_op_expand_rule,
        common.unsqueeze_unsqueeze_rule,
        common.squeeze_reshape_1d_rule,
        common.collapse_slice_rule,
        common.mul_by_1_rule,
        common.div_by_1_rule,
        common.add_0_rule,
        common.sub_0_rule,
        common.dropout_inference_rule,
    ]
    with quiet():
        for _ in range(_ROUNDS):
            before = sum(1 for _ in model.graph.all_nodes())
            shapes = _write_shapes(model)
            _join_casts(model)
            _join_reshapes(model)
            RewritePass(rules)(model)
            drop_identities(model)
            RemoveUnusedNodesPass()(model)
            if not shapes and sum(1 for _ in model.graph.all_nodes()) == before:
                break
        tidy(model)


def _write_shapes(model: ir.Model) -> int:
    """Give Reshape and Expand a constant shape where it is computed but known; return how many."""
    written = 0
    for node in nodes_of(model, "Reshape"):
        data, target = node.inputs[0], node.outputs[0]
        if node.attributes.get_int("allowzero", 0) or constant(node.inputs[1]) is not None:
            continue
        if data is None or target.shape is None or (wanted := _shape(data.shape, target.shape)) is None:
            continue
        node.replace_input_with(1, Builder(node).constant(wanted))
        written += 1
    return written


def _shape(source: ir.Shape | None, target: ir.Shape) -> list[int] | None:
    """Return a constant second input for a Reshape: sizes, 0 for that of the input there, one -1; None if none does.

    A size of 0 in the graph's own shapes means an empty value, which a 0 here does not.
    """
    wanted: list[int] = []
    for place, size in enumerate(target):
        if isinstance(size, int):
            wanted.append(size)
        elif source is not None and place < len(source) and size.value is not None and source[place] == size:
            wanted.append(0)
        else:
            wanted.append(-1)
    has_empty = any(size == 0 for size in target)
    return None if has_empty or wanted.count(-1) > 1 else wanted


def _join_casts(model: ir.Model) -> None:
    """Cast once where the type in between loses nothing."""
    for node in nodes_of(model, "Cast"):
        inner = made_by(node.inputs[0], "Cast")
        if inner is None or inner.inputs[0] is None:
            continue
        source, between = inner.inputs[0].dtype, inner.outputs[0].dtype
        if source is not None and between is not None and source in _HOLDS.get(between, ()):
            node.replace_input_with(0, inner.inputs[0])
    for node in nodes_of(model, "Cast"):
        source = node.inputs[0]
        if source is not None and source.dtype == node.attributes.get_int("to", 0) and not _is_last(node):
            replace(node.outputs[0], source)


def _join_reshapes(model: ir.Model) -> None:
    """Reshape once where the second says all sizes but one; leave out a reshape to the shape that is there."""
    for node in nodes_of(model, "Reshape"):
        inner = made_by(node.inputs[0], "Reshape")
        wanted = constant(node.inputs[1])
        if inner is not None and wanted is not None and (wanted > 0).sum() >= wanted.size - 1 and (wanted != 0).all():
            node.replace_input_with(0, inner.inputs[0])
        source, target = node.inputs[0], node.outputs[0]
        if source is not None and _is_same(source.shape, target.shape) and not _is_last(node):
            replace(target, source)


def _is_same(first: ir.Shape | None, second: ir.Shape | None) -> bool:
    if first is None or second is None or len(first) != len(second):
        return False
    named = all(isinstance(size, int) or size.value is not None for size in first)
    return named and list(first) == list(second)


def _is_last(node: ir.Node) -> bool:
    """Return whether the node makes an output of its graph, which keeps a node of its own."""
    return node.outputs[0].is_graph_output()
