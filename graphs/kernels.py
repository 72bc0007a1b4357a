"""Whether ONNX Runtime can run a graph: the installed one is asked for its kernels, no list of ours.

It knows of the processors alone that it was built for. Of CUDA a build for the CPU cannot be asked; then its published
table says which fused operators there are.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..core.errors import LlmoptError
from .attention import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

_PROVIDER, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

PUBLISHED = "docs/OperatorKernels.md of ONNX Runtime, commit 8f06330"
_PUBLISHED_FOR_CUDA = frozenset(
    {"BiasGelu", "FastGelu", "FusedMatMul", "Gelu", "MatMulNBits", "MultiHeadAttention", "QuickGelu", "RotaryEmbedding"}
    | {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}
)
"""Fused operators with a CUDA kernel for float32 and float16. GroupQueryAttention is there with other inputs."""

_OPEN_END = 2**31 - 1


def can_be_asked(provider: str) -> bool:
    """Return whether the installed ONNX Runtime was built with kernels for a provider."""
    return any(known == provider for known, _, _ in _kernels())


def without_cuda_kernel(model: ir.Model) -> list[str]:
    """Return the operators of a graph for which there is no CUDA kernel, or of which that is not known.

    Where the installed engine can be asked it is. Otherwise standard operators pass (what has no CUDA kernel runs on
    the CPU), and those of ONNX Runtime that its published table has.
    """
    found: set[str] = set()
    for node in model.graph.all_nodes():
        domain = "" if node.domain == "ai.onnx" else node.domain
        if not domain or domain == DOMAIN:  # our own are spelled out in standard operators
            continue
        opset = node.version or model.opset_imports.get(domain, 1)
        known = (
            _runs(domain, node.op_type, opset, CUDA)
            if can_be_asked(CUDA)
            else domain == "com.microsoft" and node.op_type in _PUBLISHED_FOR_CUDA
        )
        if not known:
            found.add(f"{domain}.{node.op_type}")
    return sorted(found)


def check_kernels(model: ir.Model) -> None:
    """Refuse a graph with an operator that ONNX Runtime has no kernel for on a CPU.

    Raises:
        LlmoptError: it names the operators.
    """
    local = {(domain, name) for domain, name, _ in model.functions}
    missing: dict[str, int] = defaultdict(int)
    for node in model.graph.all_nodes():
        domain = "" if node.domain == "ai.onnx" else node.domain
        opset = node.version or model.opset_imports.get(domain, 1)
        if (domain, node.op_type) not in local and not _runs(domain, node.op_type, opset):
            missing[f"{domain or 'ai.onnx'}.{node.op_type} of opset {opset}"] += 1
    if missing:
        from onnxruntime import __version__

        raise LlmoptError(
            f"ONNX Runtime {__version__} has no CPU kernel for {len(missing)} operator(s) of the graph",
            where="\n".join(f"{name}, {count} node(s)" for name, count in sorted(missing.items())),
            hint="export with `fuse: false` or another `opset`, or install a newer onnxruntime",
        )


def schema_of(node: ir.Node, model: ir.Model) -> Any:
    """Return ONNX Runtime's description of a node's operator in the graph's version, None if it knows none."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    opset = node.version or model.opset_imports.get(domain, 1)
    return _schema(domain, node.op_type, opset)


@cache
def _schema(domain: str, operator: str, opset: int) -> Any:
    found = [one for one in _schemas().get((domain, operator), ()) if one.since_version <= opset]
    return max(found, key=lambda one: one.since_version, default=None)


@cache
def _schemas() -> dict[tuple[str, str], list[Any]]:
    engine = import_module("onnxruntime.capi.onnxruntime_pybind11_state")

    found: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for schema in engine.get_all_operator_schema():
        found[schema.domain, schema.name].append(schema)
    return found


def _runs(domain: str, operator: str, opset: int, provider: str = _PROVIDER) -> bool:
    """Return whether there is a kernel, or the engine puts other operators in the place of this one.

    1. A kernel without an end serves the version of the operator that it names, no later one.
    2. A kernel with an end serves all versions between.
    3. What ONNX defines as a function of other operators is replaced by them; Constant becomes an initializer.
    """
    schema = _schema(domain, operator, opset)
    if schema is None:
        return False
    version = schema.since_version
    for start, end in _kernels().get((provider, domain, operator), ()):
        if start == version or (end != _OPEN_END and start <= version <= end):
            return True
    return (domain, operator) == ("", "Constant") or _is_function(domain, operator, opset)


def _is_function(domain: str, operator: str, opset: int) -> bool:
    from onnx import defs

    if not defs.has(operator, domain=domain):
        return False
    schema = defs.get_schema(operator, max_inclusive_version=opset, domain=domain)
    return bool(schema.has_function or schema.has_context_dependent_function)  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _kernels() -> dict[tuple[str, str, str], list[tuple[int, int]]]:
    """Return the first and last version that each kernel serves, by provider, domain and operator."""
    engine = import_module("onnxruntime.capi.onnxruntime_pybind11_state")

    found: dict[tuple[str, str, str], list[tuple[int, int]]] = defaultdict(list)
    for kernel in engine.get_all_opkernel_def():
        found[kernel.provider, kernel.domain, kernel.op_name].append(kernel.version_range)
    return found
