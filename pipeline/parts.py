"""Where the bytes of a model lie: weights by part, from the headers of safetensors or the nodes of a graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..core.errors import LlmoptError
from ..core.parts import bytes_by_part
from ..models.checkpoint import Checkpoint, read_header
from ..models.onnx_file import GraphSource, open_graph

Tensor = tuple[str, int, bool]
"""Name, bytes, and whether it has two dimensions or more."""


def source_parts(source: Checkpoint | GraphSource) -> dict[str, int]:
    """Return the bytes of a model's parts before anything was done to it."""
    if isinstance(source, Checkpoint):
        return bytes_by_part((name, info.nbytes, len(info.shape) > 1) for name, info in source.tensors.items())
    return bytes_by_part(_initializers(source.path))


def folder_parts(folder: Path) -> dict[str, int]:
    """Return the bytes of the parts of the weights in a folder, of whatever format; none where it holds none we read.

    Raises:
        LlmoptError: a file is damaged.
    """
    tensors: list[Tensor] = []
    for shard in sorted(folder.glob("*.safetensors")):
        tensors += [(name, info.nbytes, len(info.shape) > 1) for name, info in read_header(shard).items()]
    for graph in sorted(folder.glob("*.onnx")):
        tensors += _initializers(graph)
    for graph in sorted(folder.glob("openvino_*.xml")):
        if graph.with_suffix(".bin").is_file():
            tensors += _constants(graph)
    return bytes_by_part(tensors)


def _initializers(path: Path) -> Iterator[Tensor]:
    for graph in open_graph(path).graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield name, value.const_value.nbytes, len(value.const_value.shape) > 1


def _constants(path: Path) -> Iterator[Tensor]:
    """Yield the constants of an OpenVINO graph; a layer of type Const names its bytes in the .bin beside it."""
    from xml.etree.ElementTree import ParseError, iterparse

    try:
        for _, layer in iterparse(path):  # noqa: S314  (expat refuses entities that grow)
            if layer.tag != "layer":
                continue
            data = layer.find("data")
            if layer.get("type") == "Const" and data is not None:
                shape = (data.get("shape") or "").split(",")
                yield layer.get("name") or "", int(data.get("size") or 0), len(shape) > 1
            layer.clear()
    except (ParseError, ValueError) as error:
        raise LlmoptError(f"`{path.name}` is damaged", where=f"{path}\n{error}", hint="build it again") from None
