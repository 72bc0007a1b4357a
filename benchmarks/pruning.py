"""Pruning against its alternatives: which two layers, which neurons, which zeros.

    python benchmarks/pruning.py [MODEL] --calibration FILE --data FILE [--limit N] [--json F]

Every artifact is a real one: made by `llmopt run`, verified, and opened by transformers. Layers: every pair that a
model can lose against the pair that Block Influence picks, and the one that the loss picks. Widths and zeros: what is
chosen with the help of data against what is not. Windows have 255 tokens after a BOS; differences are paired by window.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from llmopt.models.checkpoint import Checkpoint
from llmopt.models.outline import block_lists, block_of
from llmopt.pipeline.demo import bundled_model
from machine import describe
from quality import Bench, Run, differences, mean_and_error

Passes = tuple[tuple[str, dict[str, Any]], ...]

WIDTHS: dict[str, Passes] = {
    f"{what} {amount}, {importance}, {'refit' if refit else 'as they are'}": (
        ("prune-width", {what: amount, "importance": importance, "refit": refit}),
    )
    for what, amount in (("mlp", "30%"), ("heads", 1))
    for importance in ("activation", "contribution")
    for refit in (False, True)
}
HIDDEN: dict[str, Passes] = {
    f"hidden 25%, {importance}": (("prune-width", {"hidden": "25%", "importance": importance}),)
    for importance in ("activation", "contribution")
}
ZEROS: dict[str, Passes] = {
    f"{pattern}, {method}": (("sparsify", {"method": method, "pattern": pattern}),)
    for pattern in ("unstructured", "4:8", "2:4")
    for method in ("magnitude", "wanda", "sparsegpt")
}
TOGETHER: dict[str, Passes] = {
    "gptq 4 bits g32": (("gptq", {"group_size": 32}),),
    "2:4, sparsegpt, gptq 4 bits g32": (("sparsify", {"pattern": "2:4"}), ("gptq", {"group_size": 32})),
    "2:4, sparsegpt, rtn 4 bits g32": (("sparsify", {"pattern": "2:4"}), ("rtn", {"group_size": 32})),
}


def row(name: str, run: Run, bench: Bench) -> str:
    """Return a line of the table."""
    increase, error = mean_and_error(differences(run.losses, bench.source_losses))
    cells = (name, f"{run.perplexity:.2f}", f"{increase:+.4f} ± {error:.4f}", f"{run.size / 2**20:.2f}")
    return f"| {' | '.join(cells)} | {run.seconds:.1f} |"


def pairs_table(bench: Bench, blocks: int, runs: dict[str, Run]) -> None:
    """Drop every pair of layers, and those that are picked; say where the picked ones rank."""
    for pair in combinations(range(blocks), 2):
        runs[f"layers {pair[0]} {pair[1]}"] = bench.run((("prune-depth", {"layers": list(pair)}),), 0)
        print(row(f"layers {pair[0]} {pair[1]}", runs[f"layers {pair[0]} {pair[1]}"], bench), flush=True)
    ranked = sorted(run.perplexity for run in runs.values())
    for by in ("influence", "loss"):
        run = bench.run((("prune-depth", {"drop": 2, "by": by}),), 0)
        place = 1 + sum(one < run.perplexity - 1e-6 for one in ranked)
        print(row(f"picked by {by}: rank {place} of {len(ranked)}", run, bench), flush=True)
        runs[f"by {by}"] = run


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bundled = bundled_model()
    parser.add_argument("model", nargs="?", type=Path, default=bundled, help="the bundled one by default")
    parser.add_argument("--calibration", type=Path, default=bundled / "calibration.txt")
    parser.add_argument("--data", type=Path, default=bundled / "heldout.txt")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--only", default="", help="tables whose name holds this")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bench = Bench(args)
    print(f"{describe()}\n\n{args.model.name}: float32 {bench.source_perplexity:.3f}")
    tensors = Checkpoint(args.model).tensors
    stacks = block_lists(tensors)
    blocks = len({block_of(name, stacks) for name in tensors} - {None})
    runs: dict[str, Run] = {}
    head = "| {} | perplexity | loss increase, nats | MiB | seconds |\n| --- | --- | --- | --- | --- |"
    if args.only in "pairs":
        print("\n" + head.format("two layers fewer"))
        pairs_table(bench, blocks, runs)
    for title, table in (("widths", WIDTHS | HIDDEN), ("zeros", ZEROS | TOGETHER)):
        if args.only not in title:
            continue
        print("\n" + head.format(title))
        for name, passes in table.items():
            runs[name] = bench.run(passes, 0)
            print(row(name, runs[name], bench), flush=True)
    if args.json:
        args.json.write_text(json.dumps({name: asdict(run) for name, run in runs.items()}), encoding="utf-8")


if __name__ == "__main__":
    main()
