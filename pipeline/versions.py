"""Versions of what an artifact is made with."""

from __future__ import annotations

import platform
from importlib.metadata import distributions, version

_VERSIONED = (
    "torch",
    "transformers",
    "compressed-tensors",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-genai",
    "openvino",
)


def own_version() -> str:
    """Return llmopt's."""
    return version("llmopt")


def versions() -> dict[str, str]:
    """Return those of Python and of the installed libraries that touch the numbers; nothing is imported for it."""
    found = {each.metadata["Name"].lower(): each.version for name in _VERSIONED for each in distributions(name=name)}
    return {"python": platform.python_version(), **found}
