"""From a transformers model in memory to an ONNX graph, by the tracer of `transformers.exporters`.

A language model becomes one graph that serves the prompt and every later token: its cache goes in and out as
`past_key_values.N.key|value` and `present.N.key|value`, and may be empty.
"""

from __future__ import annotations

import logging
import re
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any

from ..core.errors import LlmoptError
from .dummy_inputs import PAST, Sample, sample_inputs

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

log = logging.getLogger(__name__)

_NOISY = ("torch.onnx", "torch.export", "transformers", "onnxscript", "onnx_ir")


def trace(model: Any, *, cache: bool, opset: int | None = None) -> ir.Model:
    """Trace one forward pass.

    Args:
        model: a transformers model in eval mode.
        cache: give a language model a cache to read and extend.
        opset: version of the ONNX operators, the tracer's default when None.

    Returns:
        The graph, in standard ONNX operators, its varying axes named, with no trace of this machine in it.

    Raises:
        UsageError: the model takes inputs of an unknown kind.
        LlmoptError: the tracer failed; its message is in `where`.
    """
    sample = sample_inputs(model, past=PAST if cache else 0)
    inputs: dict[str, Any] = dict(sample.tensors)
    shapes = _dynamic_shapes(sample)
    if cache:
        inputs["past_key_values"] = past = _filled_cache(model, sample)
        shapes["past_key_values"] = _cache_shapes(past)
    graph_model = _export(model, inputs | {"use_cache": cache, "return_dict": True}, shapes, opset)
    if cache:
        _rename_cache(graph_model.graph, type(model).__name__)
    else:
        _drop_cache(graph_model.graph)
    _name_axes(graph_model.graph, sample)
    _forget_origin(graph_model)
    return graph_model


@contextmanager
def captured(title: str) -> Iterator[None]:
    """Keep a library's prints, warnings and logs away from stdout and stderr; they go to our log at debug level."""
    heard = StringIO()
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    try:
        with warnings.catch_warnings(), redirect_stdout(heard), redirect_stderr(heard):
            warnings.simplefilter("ignore")
            for name in _NOISY:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for line in heard.getvalue().splitlines():
            log.debug("%s: %s", title, line)


def _export(model: Any, inputs: dict[str, Any], shapes: dict[str, Any], opset: int | None) -> ir.Model:
    with captured("torch.onnx"):
        import torch
        from transformers.exporters.configs import OnnxConfig
        from transformers.exporters.exporter_onnx import OnnxExporter

        from .onnx_attention import attention_as_one_node

        config = OnnxConfig(dynamic_shapes=shapes, opset_version=opset)
        try:
            with torch.no_grad(), attention_as_one_node(model):
                program, _ = OnnxExporter().export_program(model, inputs, config)
        # The tracer raises what any line of a model's forward can raise.
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, AssertionError) as error:
            raise LlmoptError(
                f"{type(model).__name__} could not be traced to ONNX",
                where=_first_lines(error),
                hint="try `cache: false`" if "past_key_values" in inputs else None,
            ) from error
    return program


def _first_lines(error: BaseException, count: int = 6) -> str:
    """Return the message of the innermost cause: torch.onnx wraps it in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return "\n".join([type(error).__name__, *lines[:count]])


def _dynamic_shapes(sample: Sample) -> dict[str, Any]:
    from torch.export import Dim

    return {name: dict.fromkeys(axes, Dim.DYNAMIC) for name, axes in sample.axes.items()}


def _filled_cache(model: Any, sample: Sample) -> Any:
    """Return a cache that holds `PAST` tokens, one key and one value per layer, as the model filled it.

    It is made without the config, so that layers with a sliding window keep every token as well: the window is then
    in the mask alone, and the graph needs no count of the tokens that were dropped.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    ids = sample.tensors["input_ids"][:, :1].expand(-1, PAST)
    try:
        with torch.no_grad():
            kept = model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _no_plain_cache(model, _first_lines(error)) from error
    if kept is not cache or any(set(_tensors_of(layer)) != {"keys", "values"} for layer in cache.layers):
        raise _no_plain_cache(model, f"it returned a {type(kept).__name__}")
    return cache


def _no_plain_cache(model: Any, where: str) -> LlmoptError:
    return LlmoptError(
        f"{type(model).__name__} does not work with a cache of one key and one value per layer",
        where=where,
        hint="export it with `cache: false`",
    )


def _tensors_of(layer: Any) -> list[str]:
    import torch

    return [name for name, value in vars(layer).items() if isinstance(value, torch.Tensor)]


def _cache_shapes(cache: Any) -> list[dict[int, Any]]:
    from torch.export import Dim

    # Keys and values are (batch, heads, past, head size).
    return [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC} for _ in range(2 * len(cache.layers))]


def _rename_cache(graph: ir.Graph, model_name: str) -> None:
    pattern = re.compile(r"(input|output)?\.?past_key_values\.layers\.(\d+)\.(key|value)s$")
    values = [(value, "past_key_values") for value in graph.inputs] + [(value, "present") for value in graph.outputs]
    renamed = 0
    for value, prefix in values:
        if match := pattern.search(value.name or ""):
            value.name = f"{prefix}.{match[2]}.{match[3]}"
            renamed += 1
    if not renamed:
        raise LlmoptError(
            f"the traced graph of {model_name} has no cache",
            where=f"its inputs are {', '.join(str(value.name) for value in graph.inputs)}",
            hint="export it with `cache: false`",
        )


def _drop_cache(graph: ir.Graph) -> None:
    """Drop a cache that comes out although none was asked for: some decoders have a `use_cache` of their own."""
    kept = [value for value in graph.outputs if "past_key_values" not in (value.name or "")]
    graph.outputs[:] = kept


def _name_axes(graph: ir.Graph, sample: Sample) -> None:
    """Give the varying axes names that say what they are: the tracer numbers them (`s44`)."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    for value in graph.inputs:
        axes = sample.axes.get(value.name or "", {})
        if (value.name or "").startswith("past_key_values."):
            axes = {0: "batch", 2: "past_sequence"}
        for axis, name in axes.items():
            dimension = value.shape[axis] if value.shape is not None else None
            if isinstance(dimension, ir.SymbolicDim) and dimension.value is not None:
                names.setdefault(str(dimension.value), name)
    for node in graph.all_nodes():
        for value in node.outputs:
            _rename_axes(value, names)
    for value in graph.inputs:
        _rename_axes(value, names)


def _rename_axes(value: ir.Value, names: dict[str, str]) -> None:
    import onnx_ir as ir

    if value.shape is None:
        return
    for axis, dimension in enumerate(value.shape):
        if isinstance(dimension, ir.SymbolicDim) and dimension.value is not None:
            text = str(dimension.value)
            plain = re.sub(r"[A-Za-z_]\w*", lambda match: names.get(match[0], match[0]), text)
            if plain != text:
                value.shape[axis] = plain


def _forget_origin(model: ir.Model) -> None:
    """Drop the tracer's notes: they hold stack traces, with the paths of this machine."""
    model.doc_string = None
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.doc_string = None
        graph.metadata_props.clear()
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            node.doc_string = None
            node.metadata_props.clear()
            values += node.outputs
        for value in values:
            value.doc_string = None
            value.metadata_props.clear()
    for function in model.functions.values():
        function.doc_string = None
        function.metadata_props.clear()
        for node in function:
            node.doc_string = None
            node.metadata_props.clear()
