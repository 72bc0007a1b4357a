"""OpenVINO: opens `openvino_model.xml`."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.errors import LlmoptError
from ..core.runtime import Runtime
from .onnxruntime_ import OnnxSession
from .versions import installed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np

MODEL = "openvino_model.xml"
_PRECISION = ["runtime_options", "INFERENCE_PRECISION_HINT"]
_TYPES = {"i64": "int64", "i32": "int32", "f32": "float", "f16": "float16", "boolean": "bool"}


class OpenVino(Runtime):
    """The CPU engine of OpenVINO."""

    name: ClassVar[str] = "openvino"
    parallel: ClassVar[bool] = True

    def version(self) -> str:
        """Return name and version."""
        return installed("openvino")

    def opens(self, directory: Path) -> bool:
        """Return whether there is a model for OpenVINO."""
        return (directory / MODEL).is_file()

    def open(self, directory: Path, *, threads: int | None = None, parallel: int = 1) -> OpenVinoSession:
        """Load the model.

        Raises:
            LlmoptError: OpenVINO is not installed, or the model does not load.
        """
        if find_spec("openvino") is None:
            raise LlmoptError("OpenVINO is not installed", hint="pip install 'llmopt[openvino]'")
        import openvino

        with _errors(f"`{MODEL}` does not load", directory):
            core = openvino.Core()
            model = core.read_model(directory / MODEL)
            known = model.has_rt_info(_PRECISION)
            precision = str(model.get_rt_info(_PRECISION).astype(str)) if known else "f32"
            # Without a word from us it computes in bfloat16 where the processor can.
            settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": parallel}
            if threads is not None:
                settings["INFERENCE_NUM_THREADS"] = threads
            compiled = core.compile_model(model, "CPU", settings)
        return OpenVinoSession(_Compiled(compiled, directory), directory)


class OpenVinoSession(OnnxSession):
    """A model, loaded."""

    def _may_share(self) -> bool:
        return False

    def _bound(self, feed: Mapping[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
        made = self._session.run(self._outputs, {**feed, **kept})
        return dict(zip(self._outputs, made, strict=True))


@dataclass(frozen=True, slots=True)
class _Value:
    """An input or output, described as ONNX Runtime does."""

    name: str
    type: str
    shape: list[int | str]


class _Compiled:
    """A compiled model that answers as a session of ONNX Runtime does; each thread has a request of its own."""

    def __init__(self, compiled: Any, directory: Path) -> None:
        self._compiled = compiled
        self._requests = threading.local()
        self._directory = directory
        self._inputs = [_value(port) for port in compiled.inputs]
        self._outputs = [_value(port) for port in compiled.outputs]

    def get_inputs(self) -> list[_Value]:
        """Return the inputs."""
        return self._inputs

    def get_outputs(self) -> list[_Value]:
        """Return the outputs."""
        return self._outputs

    def run(self, names: Sequence[str], feed: Mapping[str, Any]) -> list[np.ndarray[Any, Any]]:
        """Compute the outputs called `names`."""
        with _errors("the model does not run", self._directory):
            if not hasattr(self._requests, "own"):
                self._requests.own = self._compiled.create_infer_request()
            results = self._requests.own.infer(dict(feed), share_inputs=True)
            return [results[name].copy() for name in names]


def _value(port: Any) -> _Value:
    kind = port.get_element_type().get_type_name()
    sizes = [each.get_length() if each.is_static else "?" for each in port.get_partial_shape()]
    return _Value(port.get_any_name(), f"tensor({_TYPES.get(kind, kind)})", sizes)


@contextmanager
def _errors(what: str, directory: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LlmoptError(what, where=f"{directory}\n{str(error).strip()[-600:]}") from error
