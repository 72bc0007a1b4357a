"""What OpenVINO makes of short texts: attention in its one kernel and spelled out, feed-forwards of texts and of rows.

    python benchmarks/short_texts.py [--batch 32] [--heads 12] [--size 32] [--lengths 8 16 24 32 48 64 128]
        [--repeats 40]

One layer of a model with HEADS heads of SIZE channels on BATCH texts of each length, random numbers, one thread, in
float32 and, where the processor has it, bfloat16. The forms take turns; milliseconds are medians, "gain" is the median
of the turns' ratios. `_SHORT` in passes/remove_padding.py is where attention's gain falls to 1.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from machine import describe

FORMS = ("one kernel", "spelled out", "texts", "rows")


def attention(heads: int, size: int, *, short: bool) -> ir.Model:
    """Return a graph from queries, keys and values, (batch, tokens, heads * size), to what attention makes of them."""
    from llmopt.graphs.attention import ATTENTION, DOMAIN, spell_out
    from llmopt.graphs.nodes import Builder

    width = heads * size
    given = [value(name, ["batch", "tokens", width]) for name in ("query", "key", "value")]
    given.append(value("seen", ["batch", 1, 1, "tokens"], ir.DataType.BOOL))
    end = ir.node("Identity", [given[0]])
    model = ir.Model(ir.Graph(given, [], nodes=[end], opset_imports={"": 20}, name="attention"), ir_version=10)
    builder = Builder(end)
    turned: list[ir.Value] = []
    for each in given[:3]:
        apart = builder.op("Reshape", each, builder.constant([0, 0, heads, size]))
        turned.append(builder.op("Transpose", apart, perm=[0, 2, 1, 3], shape=["batch", heads, "tokens", size]))
    settings = {"scale": 1.0, "softcap": 0.0, "causal": 0, "short": int(short)}
    out = builder.op(ATTENTION, *turned, given[3], domain=DOMAIN, **settings)
    return finish(model, end, builder.op("Reshape", out, builder.constant([0, 0, width])), spell_out)


def feed_forward(heads: int, size: int, *, rows: bool) -> ir.Model:
    """Return a graph from (batch, tokens, heads * size) through four times as many channels and back."""
    from llmopt.graphs.nodes import Builder
    from llmopt.graphs.rows import join_texts

    width = heads * size
    given = value("hidden", ["batch", "tokens", width])
    end = ir.node("Identity", [given])
    model = ir.Model(ir.Graph([given], [], nodes=[end], opset_imports={"": 20}, name="feed_forward"), ir_version=10)
    builder, generator, out = Builder(end), np.random.default_rng(0), given
    for channels, made in ((width, 4 * width), (4 * width, width)):
        matrix, bias = (generator.normal(scale=0.05, size=each) for each in ((channels, made), (made,)))
        if made == width:
            out = builder.op("Gelu", out, shape=["batch", "tokens", channels])
        out = builder.op("MatMul", out, builder.constant(matrix, np.float32), shape=["batch", "tokens", made])
        out = builder.op("Add", out, builder.constant(bias, np.float32), shape=["batch", "tokens", made])
    out = builder.op("Neg", out, shape=["batch", "tokens", width])
    return finish(model, end, out, join_texts if rows else None)


def value(name: str, shape: list[Any], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    """Return an input."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def finish(model: ir.Model, end: ir.Node, out: ir.Value, rewrite: Any) -> ir.Model:
    """Make a value the graph's output, and rewrite the graph."""
    out.name, out.dtype = "out", ir.DataType.FLOAT
    model.graph.outputs.append(out)
    model.graph.remove(end, safe=True)
    if rewrite is not None:
        assert rewrite(model)
    return model


def open_in_openvino(model: ir.Model, precision: str) -> Any:
    """Return a request that runs the graph."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path)
        core = openvino.Core()
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
        return core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()


def measure(requests: dict[str, Any], batch: int, length: int, width: int, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each form, in turns; the first two, which compile for the shape, are left out."""
    generator = np.random.default_rng(0)
    hidden = generator.normal(size=(batch, length, width)).astype(np.float32)
    seen = np.ones((batch, 1, 1, length), bool)
    times: dict[str, list[float]] = {form: [] for form in requests}
    for turn in range(repeats + 2):
        for form, request in requests.items():
            count = len(request.model_inputs)
            feed = [hidden] if count == 1 else [hidden, hidden, hidden, seen]
            start = time.perf_counter()
            request.infer(feed, share_inputs=True, share_outputs=True)
            if turn > 1:
                times[form].append(time.perf_counter() - start)
    return times


def gain(before: list[float], after: list[float]) -> float:
    """Return the median of the turns' ratios."""
    return statistics.median(one / two for one, two in zip(before, after, strict=True))


def main() -> None:
    """Print a table for each precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 16, 24, 32, 48, 64, 128])
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()
    import openvino

    print(f"{describe()}, openvino {openvino.__version__.partition('-')[0]}")
    heads, size = arguments.heads, arguments.size
    graphs = {
        FORMS[0]: attention(heads, size, short=False),
        FORMS[1]: attention(heads, size, short=True),
        FORMS[2]: feed_forward(heads, size, rows=False),
        FORMS[3]: feed_forward(heads, size, rows=True),
    }
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    for precision in ("f32", "bf16") if "BF16" in capabilities else ("f32",):
        requests = {form: open_in_openvino(graph, precision) for form, graph in graphs.items()}
        print(f"\n{precision}: {arguments.batch} texts, {heads} heads of {size}; ms\n")
        print(f"| tokens | attention, {FORMS[0]} | {FORMS[1]} | gain | feed-forward, {FORMS[2]} | {FORMS[3]} | gain |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for length in arguments.lengths:
            times = measure(requests, arguments.batch, length, heads * size, arguments.repeats)
            middle = {form: f"{1e3 * statistics.median(taken):.2f}" for form, taken in times.items()}
            ratios = [f"{gain(times[one], times[two]):.2f}" for one, two in (FORMS[:2], FORMS[2:])]
            cells = [middle[FORMS[0]], middle[FORMS[1]], ratios[0], middle[FORMS[2]], middle[FORMS[3]], ratios[1]]
            print(f"| {length} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
