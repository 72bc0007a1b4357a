"""What a graph answers: the reference for what is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import LlmoptError
from ..core.threads import threads
from ..graphs.nodes import constant, size
from ..models.locate import context_length
from ..models.onnx_file import GraphSource
from ..runtimes.onnxruntime_ import OnnxRuntime
from .parity import Reference, TextFacts, finite, token_batches

if TYPE_CHECKING:
    import onnx_ir as ir

Array = np.ndarray[Any, Any]

_TOKENS = ("input_ids", "decoder_input_ids")
_FOLLOW = ("attention_mask", "position_ids", "token_type_ids")
"""What the runtime makes from the tokens, beside empty caches."""

_BATCH, _OTHER = 2, 16
_VOCABULARY = 128


def graph_reference(
    source: GraphSource, rows: Sequence[Sequence[int]], seed: int, axes: Mapping[str, int]
) -> Reference:
    """Run the source graph in ONNX Runtime.

    Args:
        source: the graph.
        rows: held-out token rows; ids, and whatever else goes in, are made up when there are none.
        seed: for what is made up.
        axes: sizes that the inputs will have, by name.

    Raises:
        LlmoptError: the graph does not run.
    """
    graph = source.graph()
    inputs, samples = _inputs(graph, source, rows, seed, axes)
    try:
        session = OnnxRuntime().open_graph(source.path, threads=threads())
        try:
            made = [session.outputs({name: tensor.numpy() for name, tensor in batch.items()}) for batch in inputs]
        finally:
            session.close()
    except LlmoptError as error:
        raise LlmoptError(
            error.what,
            where=error.where,
            hint="what is made of a graph is compared with it in ONNX Runtime, so it must run there: "
            "export it again for this version, or update onnxruntime",
        ) from None
    outputs = [{name: torch.as_tensor(value) for name, value in batch.items()} for batch in made]
    return finite(Reference(inputs, outputs, samples), f"`{source.path.name}`")


def _inputs(
    graph: ir.Model, source: GraphSource, rows: Sequence[Sequence[int]], seed: int, axes: Mapping[str, int]
) -> tuple[list[dict[str, Tensor]], str]:
    given = {str(value.name): value for value in graph.graph.inputs if not value.is_initializer()}
    ids = given.get("input_ids")
    batches: list[dict[str, Tensor]] = [{}]
    samples, known = "made-up inputs", dict(axes)
    if ids is not None:
        for name, place in (("batch", 0), ("sequence", 1)):
            if (fixed := size(ids, place)) is not None:
                known[name] = fixed
        text = TextFacts(
            _vocabulary(ids, source),
            source.facts.parameters,
            context_length(source.facts.config),
            decoder="decoder_input_ids" in given,
        )
        batches, samples = token_batches(text, rows, seed, known)
    generator = np.random.default_rng(seed)
    for batch in batches:
        if "input_ids" in batch:
            known |= {"batch": batch["input_ids"].shape[0], "sequence": batch["input_ids"].shape[1]}
        for name, value in given.items():
            follows = name in _FOLLOW or name.startswith("past_key_values.")
            if name not in batch and not (follows and ids is not None):
                batch[name] = torch.as_tensor(_made_up(value, known, generator))
    return batches, samples


def _vocabulary(ids: ir.Value, source: GraphSource) -> int:
    """Return how many token ids there are: by config.json, else by the rows of the table that they are looked up in."""
    config = source.facts.config.get("text_config") or source.facts.config
    if isinstance(config.get("vocab_size"), int):
        return int(config["vocab_size"])
    users = list(ids.consumers())
    users += [user for node in users if node.op_type in ("Cast", "Identity") for user in node.outputs[0].consumers()]
    tables = [node.inputs[0] for node in users if node.op_type == "Gather"]
    heights = [rows for table in tables if constant(table) is not None and (rows := size(table, 0)) is not None]
    return min(heights, default=_VOCABULARY)


def _made_up(value: ir.Value, known: Mapping[str, int], generator: np.random.Generator) -> Array:
    """Return random numbers between 0 and 1, ones for integers (a mask, a type, an id that every table has)."""
    shape = [_size(dimension, place, known) for place, dimension in enumerate(value.shape or ())]
    kind = (value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)).newbyteorder("=")
    if np.issubdtype(kind, np.integer) or kind == np.bool_:
        return np.ones(shape, kind)
    return generator.random(shape).astype(kind)


def _size(dimension: int | ir.SymbolicDim, place: int, known: Mapping[str, int]) -> int:
    if isinstance(dimension, int):
        return dimension
    name = str(dimension.value)
    if name in known:
        return known[name]
    if place == 0:
        return known.get("batch", _BATCH)
    if "past" in name:
        return 0
    return known.get("sequence", _OTHER) if "seq" in name else _OTHER
