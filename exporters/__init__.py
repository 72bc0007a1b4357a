"""Formats: one file for each."""

from __future__ import annotations

from typing import Any

from ..core.exports import Exporter
from ..core.registry import Registry

EXPORTERS: Registry[Exporter[Any]] = Registry(
    "export",
    __name__,
    {
        "onnx": "onnx:Onnx",
        "onnx-genai": "onnx_genai:OnnxGenAI",
        "openvino": "openvino:OpenVino",
        "safetensors": "safetensors:Safetensors",
    },
)
