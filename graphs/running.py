"""Running a graph in ONNX Runtime while it is still being changed, to look at its values."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from .attention import spell_out

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Array = np.ndarray[Any, Any]


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
    with TemporaryDirectory(prefix="llmopt-") as folder:
        path = Path(folder) / "model.onnx"
        ir.save(copy, path, external_data="model.onnx.data")
        del copy
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for feed in feeds:
            yield [np.asarray(made) for made in session.run([*named, *(value.name for value in also)], dict(feed))]
