"""RTN and GPTQ against float32: perplexity, KL divergence and their paired standard errors, over seeds.

    python benchmarks/perplexity.py MODEL --calibration FILE --data FILE [--seeds 3] [--limit N] [--json FILE]

The calibration samples are drawn anew for each seed; RTN has no seed. Every artifact is a real one: quantized by
`llmopt run`, verified, and evaluated by `llmopt eval` in transformers. Without MODEL the bundled model is taken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.core.errors import UsageError
from llmopt.core.progress import Silent
from llmopt.core.recipe import CalibrationSpec, ModelSpec, Recipe, Step
from llmopt.pipeline.demo import bundled_model
from llmopt.pipeline.evaluate import evaluate
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.run import run_plan
from machine import describe

GRIDS = [
    {"bits": 4, "group_size": 32, "symmetric": True},
    {"bits": 4, "group_size": 32, "symmetric": False},
    {"bits": 4, "group_size": 64, "symmetric": True},
    {"bits": 4, "group_size": 64, "symmetric": False},
    {"bits": 3, "group_size": 32, "symmetric": True},
    {"bits": 2, "group_size": 32, "symmetric": True},
]


@dataclass(frozen=True, slots=True)
class Setting:
    """What stays the same for all rows of the table."""

    model: Path
    calibration: Path
    data: Path
    samples: int
    length: int
    limit: int | None


def measure(setting: Setting, method: str, params: dict[str, Any], seed: int) -> dict[str, Any]:
    """Quantize, verify and evaluate once."""
    recipe = Recipe(
        model=ModelSpec(id=str(setting.model)),
        calibration=CalibrationSpec(data=str(setting.calibration), samples=setting.samples, length=setting.length),
        passes=(Step(method, params),),
        exports=(Step("safetensors"),),
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "artifact"
        run_plan(make_plan(recipe), output, force=False, reporter=Silent())
        return evaluate(
            str(output), data=str(setting.data), column=None, length=255, limit=setting.limit, reporter=Silent()
        )


def row(setting: Setting, method: str, params: dict[str, Any], seeds: int) -> dict[str, Any]:
    """Return the medians over seeds, and the standard errors of the first."""
    runs = [measure(setting, method, params, seed) for seed in range(seeds if method == "gptq" else 1)]
    source = [run["source"] for run in runs]
    return {
        "method": method,
        **params,
        "perplexity": statistics.median(run["perplexity"] for run in runs),
        "perplexities": [run["perplexity"] for run in runs],
        "loss_increase": statistics.median(one["loss_increase_nats"] for one in source),
        "loss_increases": [one["loss_increase_nats"] for one in source],
        "loss_stderr": source[0]["loss_increase_stderr_nats"],
        "kl": statistics.median(one["mean_kl_nats"] for one in source),
        "kls": [one["mean_kl_nats"] for one in source],
        "kl_stderr": source[0]["mean_kl_stderr_nats"],
        "float32": source[0]["perplexity"],
        "windows": runs[0]["windows"],
    }


def show(rtn: dict[str, Any], gptq: dict[str, Any]) -> str:
    """Return two lines of the table: RTN, and GPTQ with what it wins back."""
    back = 1 - gptq["loss_increase"] / rtn["loss_increase"]
    kl_back = 1 - gptq["kl"] / rtn["kl"]
    grid = f"| {rtn['bits']} | {rtn['group_size']} | {'symmetric' if rtn['symmetric'] else 'asymmetric'} "
    lines: list[str] = []
    for one, won in ((rtn, "|  |  |"), (gptq, f"| {back:.0%} | {kl_back:.0%} |")):
        lines.append(
            f"{grid}| {one['method']} | {one['perplexity']:.3f} "
            f"| {1e3 * one['loss_increase']:+.2f} ± {1e3 * one['loss_stderr']:.2f} "
            f"| {1e3 * one['kl']:.3f} ± {1e3 * one['kl_stderr']:.3f} {won}"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    bundled = bundled_model()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=bundled)
    parser.add_argument("--calibration", type=Path, default=bundled / "calibration.txt")
    parser.add_argument("--data", type=Path, default=bundled / "heldout.txt")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    setting = Setting(args.model, args.calibration, args.data, args.samples, args.length, args.limit)
    print(f"{describe()}\n{args.model.name}, {args.samples} x {args.length} calibration tokens, {args.seeds} seeds\n")
    print(
        "| bits | group | grid | method | perplexity | loss increase, 1e-3 nats | KL, 1e-3 nats | loss back | KL back |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows: list[dict[str, Any]] = []
    for params in GRIDS:
        pair = [row(setting, method, params, args.seeds) for method in ("rtn", "gptq")]
        rows += pair
        print(show(*pair), flush=True)
    print(f"\nfloat32: {rows[0]['float32']:.3f} on {rows[0]['windows']} windows of 255 tokens after a BOS")
    try:
        make_plan(Recipe(model=ModelSpec(id=str(args.model)), passes=(Step("rtn"),), exports=(Step("safetensors"),)))
    except UsageError as error:
        print(f"\ngroup size 128 is refused:\n{error}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
