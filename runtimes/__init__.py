"""Opening an artifact in the engine where it will run."""

from __future__ import annotations

from ..core.registry import Registry
from ..core.runtime import Runtime

RUNTIMES: Registry[Runtime] = Registry(
    "runtime",
    __name__,
    {
        "onnx-genai": "onnx_genai:OnnxGenAI",
        "onnxruntime": "onnxruntime_:OnnxRuntime",
        "openvino": "openvino_:OpenVino",
        "packed-codes": "packed:PackedCodes",
        "transformers": "transformers_:Transformers",
    },
)
