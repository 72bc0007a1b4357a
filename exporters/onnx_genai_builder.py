"""Calling the model builder of ONNX Runtime GenAI: a script with generic module names that talks to stdout."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import LlmoptError
from .onnx_trace import captured

_PACKAGE = "onnxruntime_genai"
_RAISED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def known_architectures() -> frozenset[str]:
    """Return the architectures that the installed builder names, from its source text: importing it imports torch.

    Raises:
        LlmoptError: onnxruntime-genai is not installed.
    """
    source = (_package_folder() / "models" / "builder.py").read_text(encoding="utf-8")
    return frozenset(re.findall(r'architectures\[0\] == "(\w+)"', source))


def build(
    checkpoint: Path, output: Path, *, precision: str, provider: str, options: dict[str, str], architecture: str
) -> None:
    """Build a floating-point graph with its genai_config.json and tokenizer files.

    Args:
        checkpoint: a Hugging Face folder with weights, config and tokenizer.
        output: folder to write into.
        precision: "fp32" or "fp16".
        provider: "cpu" or "cuda".
        options: the builder's extra options; it ignores those it does not know.
        architecture: to be named in an error.

    Raises:
        LlmoptError: the builder failed; its message is in `where`.
    """
    with captured("onnxruntime-genai builder"), _builder_path():
        from onnxruntime_genai.models import builder  # type: ignore[import-not-found]

        cache = str(output / ".cache")
        arguments = ("", str(checkpoint), str(output), precision, provider, cache)
        try:
            parsed = builder.parse_extra_options(*arguments, [f"{key}={value}" for key, value in options.items()])
            _adapt(parsed["hf_details"]["hf_config"])
            builder.create_model(*arguments, **parsed)
        # The builder reads configs by attribute and raises whatever comes of it.
        except _RAISED as error:
            raise LlmoptError(
                f"the ONNX Runtime GenAI builder cannot build {architecture}",
                where=f"{type(error).__name__}: {error}",
                hint="use the `onnx` export instead",
            ) from error


def rope_fault(architecture: str, config: Mapping[str, Any]) -> str | None:
    """Return why the builder would silently get the rotary positions wrong, from config.json; None if it does not.

    1. For layers of two kinds it computes the angles with two bases, but scales both as the full-attention layers ask.
    2. For Llama it knows the scaling `llama3` and leaves out any other.
    3. It does not round the bounds of YaRN to whole dimensions, as transformers does unless `truncate` is false.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    by_layer = "full_attention" in parameters or config.get("rope_local_base_freq") is not None
    scaling = parameters.get("full_attention", parameters)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if by_layer and kind != "default":
        return f"the full-attention layers alone have `{kind}` rotary scaling"
    if architecture == "LlamaForCausalLM" and kind not in ("default", "llama3"):
        return f"it leaves out `{kind}` rotary scaling"
    if kind == "yarn" and scaling.get("truncate", True):
        return "it does not round the bounds of `yarn` rotary scaling to whole dimensions"
    return None


def _adapt(config: Any) -> None:
    """Say to the builder what transformers says otherwise: it reads configs of other versions.

    1. It knows no rotary parameters by the kind of layer.
    2. It reads the kind of rotary scaling by its old name as well, and takes 0 where YaRN leaves a default out.
    3. It takes a sliding window for that of all layers only where each is said to have it; where the config lists no
       kinds of layers (Mistral, Phi-3), all of them do.
    """
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(parameters, Mapping):
        if {"full_attention", "sliding_attention"} <= set(parameters):
            config.rope_local_base_freq = parameters["sliding_attention"]["rope_theta"]
            parameters = parameters["full_attention"]
        kind = parameters.get("rope_type", "default")
        defaults = {"beta_fast": 32.0, "beta_slow": 1.0} if kind == "yarn" else {}
        config.rope_parameters = {"type": kind, **defaults, **parameters}
    if getattr(config, "sliding_window", None) and getattr(config, "layer_types", None) is None:
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers


def _package_folder() -> Path:
    # Only the top-level name: looking for a submodule would import the package.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise LlmoptError("onnxruntime-genai is not installed", hint="pip install onnxruntime-genai")
    return Path(spec.origin).parent


@contextmanager
def _builder_path() -> Iterator[None]:
    """Let the builder import its siblings (`builders`, `quantization`…) as top-level modules, only while it runs."""
    kept = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = kept
