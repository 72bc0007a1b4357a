"""What padding removal gains: the same graph with and without it, in turns, over fill ratios, batches and lengths.

    python benchmarks/padding.py MODEL [--batches 1 8 32] [--lengths 128 384] [--fills 1 0.75 0.5 0.25] [--groups 8]
        [--engine onnxruntime] [--rounds 7] [--json FILE]

MODEL is an encoder's folder. A batch has one text of full length, the others are drawn so that the batch is filled to
the ratio r. Beside the gain stands what the number of multiplications promises, (6 H + S) / (6 r H + S): H channels, S
tokens, attention over the whole rectangle; groups of similar length can do better than that. One thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe


def build(model: str, engine: str, groups: int, folder: Path) -> dict[str, Any]:
    """Export the model with and without padding removal; return its sessions."""
    from llmopt.core.progress import Silent
    from llmopt.core.recipe import ModelSpec, Recipe, Step
    from llmopt.pipeline.plan import make_plan
    from llmopt.pipeline.run import run_plan
    from llmopt.runtimes import RUNTIMES

    sessions: dict[str, Any] = {}
    export = {"onnxruntime": "onnx", "openvino": "openvino"}[engine]
    packing = Step("remove-padding", {"groups": groups})
    for name, passes in (("padded", ()), ("packed", (packing,))):
        recipe = Recipe(
            model=ModelSpec(id=model, task="feature-extraction"),
            passes=(*passes, Step("fuse")),
            exports=(Step(export),),
        )
        run_plan(make_plan(recipe), folder / name, force=False, reporter=Silent())
        sessions[name] = RUNTIMES.load(engine)().open(folder / name, threads=1)
    return sessions


def batch(rows: int, length: int, fill: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return a batch of which `fill` is text."""
    lengths = np.full(rows, length)
    if fill < 1 and rows > 1:
        rest = (fill * rows - 1) / (rows - 1) * length
        spread = np.linspace(0.5, 1.5, rows - 1) * rest
        lengths[1:] = np.clip(np.round(spread), 1, length)
        rng.shuffle(lengths)
    mask = (np.arange(length)[None] < lengths[:, None]).astype(np.int64)
    return {"input_ids": rng.integers(1000, 20000, mask.shape) * mask, "attention_mask": mask}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 384])
    parser.add_argument("--fills", type=float, nargs="+", default=[1, 0.75, 0.5, 0.25])
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--engine", choices=["onnxruntime", "openvino"], default="onnxruntime")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    width = json.loads((Path(given.model) / "config.json").read_text())["hidden_size"]
    rows: list[dict[str, Any]] = []
    print(describe(), "", sep="\n")
    print(
        "| batch | length | fill | padded, ms | packed, ms | gain | promised | share of it |",
        "| " + "--- | " * 8,
        sep="\n",
    )
    with tempfile.TemporaryDirectory() as folder:
        sessions = build(given.model, given.engine, given.groups, Path(folder))
        for size, length, fill in product(given.batches, given.lengths, given.fills):
            if size == 1 and fill < 1:
                continue  # a text alone is never padded
            feed = batch(size, length, fill, np.random.default_rng(0))
            times: dict[str, list[float]] = {name: [] for name in sessions}
            for turn in range(given.rounds + 1):
                for name, session in sessions.items():
                    start = time.perf_counter()
                    session.outputs(feed)
                    if turn:  # the first is for warming up
                        times[name].append(1e3 * (time.perf_counter() - start))
            gain = statistics.median(a / b for a, b in zip(times["padded"], times["packed"], strict=True))
            real = float(feed["attention_mask"].mean())
            promised = (6 * width + length) / (6 * real * width + length)
            padded, packed = (statistics.median(times[name]) for name in ("padded", "packed"))
            share = (gain - 1) / (promised - 1) if promised > 1 else None
            rows.append(
                {"batch": size, "length": length, "fill": real, "padded_ms": padded, "packed_ms": packed}
                | {"gain": gain, "promised": promised}
            )
            print(
                f"| {size} | {length} | {real:.2f} | {padded:.1f} | {packed:.1f} | {gain:.2f} | {promised:.2f} "
                f"| {'-' if share is None else f'{share:.0%}'} |",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
