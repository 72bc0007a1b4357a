"""Running a graph in ONNX Runtime while it is still being changed, to look at its values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..core.ends import scratch
from ..core.threads import take_turns, threads
from .attention import spell_out

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Array = np.ndarray[Any, Any]

_BATCH, _PAST, _NEW = 2, 0, 24


def outputs(
    model: ir.Model, feeds: Sequence[Mapping[str, Array]], also: Sequence[ir.Value] = ()
) -> Iterator[list[Array]]:
    """Run a copy of the graph on each feed and yield its outputs, and then the values of `also`.

    Args:
        model: the graph, left as it is.
        feeds: arrays by input name.
        also: further values of the outermost graph.
    """
    import onnxruntime

    copy = model.clone()
    known = {value.name: value for node in copy.graph for value in node.outputs}
    known |= {value.name: value for value in copy.graph.inputs}
    named = [value.name for value in copy.graph.outputs]
    extra = [known[value.name] for value in also]
    copy.graph.outputs.extend(value for value in dict.fromkeys(extra) if value not in copy.graph.outputs)
    spell_out(copy)
    with scratch() as folder:
        path = folder / "model.onnx"
        ir.save(copy, path, external_data="model.onnx.data")
        del copy
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads()
        if take_turns(threads()):
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for feed in feeds:
            yield [np.asarray(made) for made in session.run([*named, *(value.name for value in also)], dict(feed))]


def made_up(model: ir.Model, vocabulary: int, seed: int) -> dict[str, Array]:
    """Return inputs by what they are called and how large they are: random ids, masks of ones, normal numbers.

    Args:
        model: the graph.
        vocabulary: how many ids there are.
        seed: of what is random.
    """
    generator = np.random.default_rng(seed)
    sizes: dict[str, int] = {}
    given = {str(value.name): value for value in model.graph.inputs if not value.is_initializer()}
    for value in given.values():
        for dimension in value.shape or ():
            if isinstance(dimension, ir.SymbolicDim) and dimension.value is not None:
                sizes.setdefault(dimension.value, _made_up_size(dimension.value))
    made: dict[str, Array] = {}
    for name, value in given.items():
        shape = [each if isinstance(each, int) else sizes.get(str(each.value), _BATCH) for each in value.shape or ()]
        kind = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
        if name.endswith("ids") and "type" not in name and "position" not in name:
            made[name] = generator.integers(0, vocabulary, shape).astype(kind)
        elif "position" in name and shape:
            made[name] = np.broadcast_to(np.arange(shape[-1]), shape).astype(kind)
        elif "type" in name:
            made[name] = np.zeros(shape, kind)
        elif np.issubdtype(kind, np.integer) or kind == np.bool_:
            made[name] = np.ones(shape, kind)
        else:
            made[name] = generator.standard_normal(shape).astype(kind)
    return made


def _made_up_size(axis: str) -> int:
    """Return a size for an axis: what is called total holds the past and the new tokens."""
    if "batch" in axis:
        return _BATCH
    if "total" in axis or "+" in axis:
        return _PAST + _NEW
    return _PAST if "past" in axis else _NEW
