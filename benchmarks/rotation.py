"""Rounding with and without `rotate` before it, on a model and on the same model with outlier channels.

    python benchmarks/rotation.py MODEL --calibration FILE --data FILE [--seeds 3] [--limit N] [--json FILE]

MODEL is a Llama folder; outliers.py says what the outliers are. Every artifact is a real one: quantized by
`llmopt run`, verified, and evaluated by `llmopt eval` in transformers against the model it was made of. Rotations and
calibration samples are drawn anew for each seed; plain `rtn` has none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from llmopt.core.progress import Silent
from llmopt.core.recipe import CalibrationSpec, ModelSpec, Recipe, Step
from llmopt.pipeline.measuring.evaluate import evaluate
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.run import run_plan
from machine import describe
from outliers import KINDS, write_outliers

GRIDS: tuple[dict[str, Any], ...] = (
    {"bits": 4, "group_size": 64},
    {"bits": 4, "group_size": "channel"},
    {"bits": 3, "group_size": 32},
)
METHODS = ("rtn", "gptq")


def measure(args: argparse.Namespace, model: Path, passes: tuple[Step, ...], seed: int) -> dict[str, Any]:
    """Quantize, verify and evaluate once."""
    recipe = Recipe(
        model=ModelSpec(id=str(model)),
        calibration=CalibrationSpec(data=str(args.calibration), samples=args.samples, length=args.length),
        passes=passes,
        exports=(Step("safetensors"),),
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "artifact"
        run_plan(make_plan(recipe), output, force=False, reporter=Silent())
        return evaluate(str(output), data=str(args.data), column=None, length=255, limit=args.limit, reporter=Silent())


def row(args: argparse.Namespace, model: Path, method: str, grid: dict[str, Any], *, rotated: bool) -> dict[str, Any]:
    """Return medians over the seeds."""
    passes = (*((Step("rotate"),) if rotated else ()), Step(method, grid))
    seeds = args.seeds if rotated or method == "gptq" else 1
    runs = [measure(args, model, passes, seed) for seed in range(seeds)]
    return {
        "model": model.name,
        "method": " -> ".join(step.name for step in passes),
        **grid,
        "perplexities": [run["perplexity"] for run in runs],
        "kls": [run["source"]["mean_kl_nats"] for run in runs],
        "kl_stderr": runs[0]["source"]["mean_kl_stderr_nats"],
        "float32": runs[0]["source"]["perplexity"],
        "windows": runs[0]["windows"],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=("plain", *KINDS), default=("plain", *KINDS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{describe()}\n{args.model.name}, {args.samples} x {args.length} calibration tokens, {args.seeds} seeds\n")
    print("| outliers | bits | group | method | perplexity | KL, 1e-3 nats (seeds) | float32 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in args.kinds:
            model = args.model if kind == "plain" else write_outliers(args.model, Path(scratch) / kind, kind)
            for grid in GRIDS:
                for method in METHODS:
                    for rotated in (False, True):
                        one = row(args, model, method, grid, rotated=rotated)
                        rows.append(one)
                        kls = ", ".join(f"{1e3 * kl:.1f}" for kl in one["kls"])
                        print(
                            f"| {kind} | {grid['bits']} | {grid['group_size']} | {one['method']} "
                            f"| {statistics.median(one['perplexities']):.2f} "
                            f"| {1e3 * statistics.median(one['kls']):.1f} ± {1e3 * one['kl_stderr']:.1f} ({kls}) "
                            f"| {one['float32']:.2f} |",
                            flush=True,
                        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
