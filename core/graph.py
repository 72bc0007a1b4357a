"""A model as an ONNX graph, on its way through the passes that work on graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from .facts import ModelFacts

Engine = Literal["onnxruntime", "openvino"]
"""What computes the graph in the end: passes choose operators that it is fast at."""

SHARED_CACHE = "llmopt.shared_cache"
"""Metadata of a graph whose past may be longer than what it holds, and the same memory as the present."""


@dataclass(slots=True)
class GraphModel:
    """A graph, changed in place by the passes.

    Attributes:
        graph: the graph. Until it is saved, attention may be `llmopt.Attention` nodes (graphs/attention.py).
        facts: the outline of the model it was traced from.
        engine: what will compute it.
        feeds: calibration batches, arrays by the names of the graph's inputs; none without calibration data.
        rounded: hashes of the codes and scales that passes on the graph gave weights, which the artifact must hold.
    """

    graph: ir.Model
    facts: ModelFacts
    engine: Engine
    feeds: Sequence[Mapping[str, np.ndarray[Any, Any]]] = field(default_factory=tuple[Any, ...])
    rounded: set[str] = field(default_factory=set[str])
