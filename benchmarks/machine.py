"""The machine that a table was measured on, in a line."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

from llmopt.pipeline.bench import processor
from llmopt.pipeline.doctor import instruction_sets


def describe() -> str:
    """Return processor, cores, instruction sets and the versions that matter."""
    sets = ", ".join(name for name, there in instruction_sets().items() if there)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "onnxruntime"))
    return f"{processor()}, {os.cpu_count()} cores ({sets}); Python {platform.python_version()}, {libraries}"


if __name__ == "__main__":
    print(describe())
