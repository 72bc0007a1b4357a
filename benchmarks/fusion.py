"""Latency of fused graphs beside the same graphs unfused, family by family, in ONNX Runtime.

    python benchmarks/fusion.py [--only TEXT ...] [--factor 4] [--rounds 15] [--json FILE]

The models are those of tests/families.py, FACTOR times as wide, with random weights. A prompt is 64 tokens of one text,
or a batch of two where the model is an encoder; a step is one token after 64. Both graphs are loaded once and take
turns, one thread each; a time is the median of the rounds, the ratio that of fused to unfused in the same round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

TOKENS, VOCABULARY = 64, 200
WIDTHS = ("hidden_size", "intermediate_size", "d_model", "d_ff", "d_kv", "head_dim", "dim", "hidden_dim", "n_embd")
WIDTHS += ("ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "word_embed_proj_dim")
WIDTHS += ("query_pre_attn_scalar",)


def graphs(name: str, factor: int) -> tuple[Any, Any]:
    """Return the unfused and the fused graph of a family."""
    from families import FAMILIES, make_model
    from llmopt.exporters.onnx_trace import trace
    from llmopt.graphs.attention import spell_out
    from llmopt.graphs.fusion import fuse_for_onnxruntime

    family = FAMILIES[name]
    wider = {key: value * factor for key, value in family.config.items() if key in WIDTHS}
    plain = trace(make_model(family, **wider), cache=family.is_decoder)
    fused = plain.clone()
    fuse_for_onnxruntime(fused, positions=128)
    for graph in (plain, fused):
        spell_out(graph)
    return plain, fused


def session(graph: Any, folder: Path) -> Any:
    import onnx_ir as ir
    import onnxruntime

    ir.save(graph, folder / "model.onnx", external_data="model.onnx.data")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def feed(graph: Any, *, new: int, past: int, batch: int) -> dict[str, Any]:
    """Return inputs of so many tokens behind a cache of so many."""
    from llmopt.graphs.running import made_up

    made = made_up(graph, VOCABULARY, 0)
    for name, array in made.items():
        if name.startswith("past_key_values."):
            made[name] = np.random.default_rng(0).random((batch, array.shape[1], past, array.shape[3]), np.float32)
        elif name == "position_ids":
            made[name] = np.broadcast_to(np.arange(past, past + new), (batch, new)).copy()
        elif name == "attention_mask":
            made[name] = np.ones((batch, past + new), array.dtype)
        elif array.ndim == 2 and "ids" in name:
            made[name] = np.resize(array, (batch, new))
    return made


def timed(sessions: list[Any], inputs: dict[str, Any], rounds: int) -> tuple[list[float], float]:
    """Return the median milliseconds of both, and the median of the rounds' ratios."""
    for one in sessions:
        one.run(None, inputs)
    start = time.perf_counter()
    sessions[0].run(None, inputs)
    repeats = max(3, int(0.02 / max(time.perf_counter() - start, 1e-5)))
    seen: list[list[float]] = [[], []]
    for number in range(rounds):
        for at in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            for _ in range(repeats):
                sessions[at].run(None, inputs)
            seen[at].append((time.perf_counter() - start) / repeats * 1e3)
    ratio = statistics.median(fused / plain for plain, fused in zip(*seen, strict=True))
    return [statistics.median(each) for each in seen], ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="families whose names hold a TEXT")
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    import torch
    from families import FAMILIES

    torch.set_num_threads(1)
    print(f"{describe()}\n")
    print("| family | nodes | fused | run | unfused, ms | fused, ms | fused / unfused |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows: list[dict[str, Any]] = []
    for name in FAMILIES:
        if args.only and not any(text in name for text in args.only):
            continue
        plain, fused = graphs(name, args.factor)
        nodes = [sum(Counter(node.op_type for node in graph.graph.all_nodes()).values()) for graph in (plain, fused)]
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            sessions = [session(plain, Path(first)), session(fused, Path(second))]
            cached = FAMILIES[name].is_decoder
            runs = {"prompt": (TOKENS, 0), "step": (1, TOKENS)} if cached else {"batch": (TOKENS, 0)}
            for run, (new, past) in runs.items():
                inputs = feed(plain, new=new, past=past, batch=1 if cached else 2)
                times, ratio = timed(sessions, inputs, args.rounds)
                rows.append({"family": name, "nodes": nodes, "run": run, "ms": times, "ratio": ratio})
                cells = [name, *map(str, nodes), run, *(f"{each:.2f}" for each in times), f"{ratio:.2f}"]
                print(f"| {' | '.join(cells)} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
