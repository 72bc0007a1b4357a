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
from statistics import median
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
    for what, amount in (("mlp", "30%"), ("heads", "50%"))
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


class Table:
    """Rows that are measured once: those that the JSON file holds are not repeated.

    Args:
        bench: the model and the text.
        only: measure rows whose name holds one of these texts; all when empty.
        kept: where runs are kept, None for nowhere.
    """

    def __init__(self, bench: Bench, only: list[str], kept: Path | None) -> None:
        self._bench = bench
        self._only = only
        self._kept = kept
        known = json.loads(kept.read_text(encoding="utf-8")) if kept is not None and kept.is_file() else {}
        self.runs = {name: Run(**run) for name, run in known.items()}

    def row(self, name: str, passes: Passes) -> None:
        """Measure a row and print it."""
        if self._only and not any(text in name for text in self._only):
            return
        if name not in self.runs:
            self.runs[name] = self._bench.run(passes, 0)
            if self._kept is not None:
                document = {one: asdict(run) for one, run in self.runs.items()}
                self._kept.write_text(json.dumps(document) + "\n", encoding="utf-8")
        run = self.runs[name]
        increase, error = mean_and_error(differences(run.losses, self._bench.source_losses))
        cells = (name, f"{run.perplexity:.2f}", f"{increase:+.4f} ± {error:.4f}", f"{run.size / 2**20:.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)


def tell_ranks(runs: dict[str, Run]) -> None:
    """Say where the picked pairs stand among all."""
    ranked = sorted(run.perplexity for name, run in runs.items() if name.startswith("layers "))
    for name, run in runs.items():
        if name.startswith("picked ") and ranked:
            place = 1 + sum(one < run.perplexity - 1e-6 for one in ranked)
            mean = sum(ranked) / len(ranked)
            print(f"{name}: rank {place} of {len(ranked)}; a pair at random {mean:.2f}, median {median(ranked):.2f}")


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
    parser.add_argument("--only", action="append", default=[], help="rows whose name holds this text")
    parser.add_argument("--json", type=Path, help="keep all runs there; those that it holds are not repeated")
    args = parser.parse_args()
    bench = Bench(args)
    print(f"{describe()}\n{args.model.name}, {args.samples} x {args.length} calibration tokens")
    print(f"float32: {bench.source_perplexity:.3f} on {len(bench.source_losses)} windows\n")
    tensors = Checkpoint(args.model).tensors
    stacks = block_lists(tensors)
    blocks = len({block_of(name, stacks) for name in tensors} - {None})
    print("| artifact | perplexity | loss increase, nats | MiB |\n| --- | --- | --- | --- |")
    table = Table(bench, args.only, args.json)
    for first, second in combinations(range(blocks), 2):
        table.row(f"layers {first} {second}", (("prune-depth", {"layers": [first, second]}),))
    for by in ("influence", "answers", "loss"):
        table.row(f"picked by {by}", (("prune-depth", {"drop": 2, "by": by}),))
    for name, passes in (WIDTHS | HIDDEN | ZEROS | TOGETHER).items():
        table.row(name, passes)
    print()
    tell_ranks(table.runs)


if __name__ == "__main__":
    main()
