"""An ONNX file as a model: read lazily, checked before anything is done with it, and its outline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..core.digests import Digest, file_sha256, files_sha256
from ..core.errors import LlmoptError
from ..core.facts import ModelFacts
from ..core.untrusted import is_inner_path, lies_in
from ..graphs.extents import check_extents
from ..graphs.limits import check_graph_file
from .locate import Location, read_config
from .outline import has_tokenizer
from .side_files import copy_side_files

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..core.quantized import Grid

_AGAIN = "fetch or export the graph again"
_MAX_DIMENSIONS = 64
_MAX_ELEMENTS = 1 << 48
_DTYPES = {"FLOAT": "float32", "DOUBLE": "float64"}
_KNOWN = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True, slots=True)
class GraphSource:
    """A model that is a graph already.

    Attributes:
        location: its file.
        facts: its outline.
    """

    location: Location
    facts: ModelFacts

    @property
    def path(self) -> Path:
        """The file."""
        assert self.location.graph is not None
        return self.location.graph

    @property
    def quantized(self) -> Mapping[str, Grid]:
        """None of the layers was quantized by a pass."""
        return MappingProxyType({})

    def graph(self) -> ir.Model:
        """Return the graph, its large weights left on disk."""
        return open_graph(self.path)

    @property
    def files(self) -> list[Path]:
        """The graph and its external data."""
        names = sorted({str(tensor.location) for tensor in external_tensors(self.graph())})
        return [self.path, *(self.path.parent / name for name in names)]

    def sha256(self, digest: Digest = file_sha256) -> str:
        """Return a hash over the graph and its external data."""
        return files_sha256(((file.relative_to(self.path.parent).as_posix(), file) for file in self.files), digest)

    def save_side_files(self, directory: Path) -> None:
        """Copy config, tokenizer and processor files that lie beside the graph."""
        copy_side_files(self.location.folder, directory, with_config=True)


def open_graph(path: Path) -> ir.Model:
    """Return the graph in a file, its external weights left on disk.

    Raises:
        LlmoptError: it is damaged, its weights are not where it says, or its operators are too new.
    """
    import onnx_ir as ir
    from google.protobuf.message import DecodeError

    from ..graphs.stored import read_small

    check_graph_file(path)
    try:
        model = ir.load(path)
    except (DecodeError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, OSError) as error:
        raise _damaged(path, " ".join(str(error).split())[:300] or type(error).__name__) from None
    if not len(model.graph) or not model.graph.outputs:
        raise _damaged(path, f"it holds {len(model.graph)} nodes and {len(model.graph.outputs)} outputs")
    _check_opset(path, model)
    _check_values(path, model)
    for tensor in external_tensors(model):
        _check_size(path, tensor)
        _check_external(path, tensor)
    for value in [value for graph in model.graphs() for value in graph.initializers.values()]:
        _check_inner(path, value.const_value)
    read_small(model)
    return model


def _check_opset(path: Path, model: ir.Model) -> None:
    import onnx

    opset, newest = model.opset_imports.get("", 0), onnx.defs.onnx_opset_version()
    if opset > newest:
        raise LlmoptError(
            f"`{path.name}` is written in a newer version of ONNX",
            where=f"{path}\nopset {opset}; the installed onnx {onnx.__version__} knows versions up to {newest}",
            hint="update onnx and onnxruntime, or export the graph in an older opset",
        )


def _check_values(path: Path, model: ir.Model) -> None:
    for graph in model.graphs():
        for node in graph:
            for value in node.inputs:
                if value is not None and _is_loose(value):
                    raise _damaged(path, f"nothing makes `{value.name}`, which `{node.name or node.op_type}` reads")


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Yield the tensors that lie in files of their own, those of inner graphs and attributes included."""
    import onnx_ir as ir

    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    yield attribute.value


def graph_outline(location: Location) -> ModelFacts:
    """Return what the graph and the config.json beside it tell."""
    assert location.graph is not None
    model = open_graph(location.graph)
    check_extents(location.graph)
    dtypes: Counter[str] = Counter()
    parameters = 0
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None:
                parameters += prod(tensor.shape.numpy())
                dtypes[_DTYPES.get(tensor.dtype.name, tensor.dtype.name.lower())] += tensor.nbytes
    config = read_config(location.folder) if (location.folder / "config.json").is_file() else {}
    commonest = next((name for name, _ in dtypes.most_common() if name in _KNOWN), "float32")
    return ModelFacts(
        source=location.source,
        model_type=str(config.get("model_type", "")),
        architecture=str((config.get("architectures") or ["ONNX graph"])[0]),
        dtype=commonest,
        parameters=max(1, parameters),
        bytes=sum(dtypes.values()),
        largest_block_bytes=0,
        outside_bytes=sum(dtypes.values()),
        blocks=0,
        linears=(),
        has_tokenizer=has_tokenizer(location.folder),
        config=config,
    )


def _is_loose(value: ir.Value) -> bool:
    return value.producer() is None and not value.is_graph_input() and not value.is_initializer()


def _check_size(path: Path, tensor: ir.TensorProtocol) -> None:
    """Refuse a shape that no weights have."""
    import onnx_ir as ir

    sizes = tensor.shape.numpy()
    if tensor.dtype == ir.DataType.UNDEFINED:
        raise _damaged(path, f"`{tensor.name}` has no type")
    if min(sizes, default=0) < 0 or len(sizes) > _MAX_DIMENSIONS or prod(sizes) > _MAX_ELEMENTS:
        raise _damaged(path, f"`{tensor.name}` has the shape {list(sizes[:8])}")


def _check_inner(path: Path, tensor: ir.TensorProtocol | None) -> None:
    """Refuse weights inside the file that are not of the size they say."""
    import onnx_ir as ir

    if isinstance(tensor, ir.TensorProtoTensor):
        _check_size(path, tensor)
        try:
            size = len(tensor.tobytes())
        except (ValueError, TypeError, LookupError, AssertionError) as error:  # onnx_ir asserts that types agree
            why = str(error)[:300] or "its values are stored as those of another type"
            raise _damaged(path, f"`{tensor.name}` cannot be read: {why}") from None
        if size != tensor.nbytes:
            raise _damaged(path, f"`{tensor.name}` takes {tensor.nbytes} bytes, the file holds {size}")


def _check_external(path: Path, tensor: ir.ExternalTensor) -> None:
    """Refuse weights that are missing, cut short, or not the graph's own files."""
    name = str(tensor.location)
    place = path.parent / name
    if not is_inner_path(name) or not lies_in(place, path.parent):
        raise LlmoptError(
            f"the weights of `{path.name}` lie outside its folder",
            where=f"`{tensor.name}` is in {name[:300]!r}{_led_to(place)}",
            hint="put the files with the weights themselves, no links, into the graph's folder",
        )
    if not place.is_file():
        raise LlmoptError(
            f"the weights of `{path.name}` are missing",
            where=f"`{tensor.name}` should be in {place}",
            hint="fetch that file too: a graph and its external data belong together",
        )
    size = place.stat().st_size
    end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
    if not 0 <= (tensor.offset or 0) <= end <= size or (tensor.length not in (None, tensor.nbytes)):
        raise _damaged(place, f"`{tensor.name}` takes {tensor.nbytes} bytes up to byte {end}, the file has {size}")


def _led_to(place: Path) -> str:
    """Return where a link leads, in words; nothing for a path that is none."""
    with suppress(OSError, ValueError):
        return f", a link to {place.readlink()}" if place.is_symlink() else ""
    return ""


def _damaged(path: Path, why: str) -> LlmoptError:
    return LlmoptError(f"`{path.name}` is damaged", where=f"{path}\n{why}", hint=_AGAIN)
