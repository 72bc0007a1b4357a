"""Mixed bits against uniform ones of the same size: perplexity, KL divergence, and the curve of quality over size.

    python benchmarks/allocation.py MODEL --calibration FILE --data FILE [--method gptq] [--svg FILE] [--json FILE]

Bits per weight are those of the quantized layers, scales included, as they are stored: a model in bfloat16 pays 0.5
bits for its scales at group size 32. Where no uniform width has the size of a budget, the line between its neighbours
is what mixing them at random would give. Every artifact is a real one: quantized by `llmopt run`, verified, and
evaluated by `llmopt eval` in transformers. Without MODEL the bundled model is taken.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmopt.core.progress import Silent
from llmopt.core.recipe import CalibrationSpec, ModelSpec, Recipe, Step
from llmopt.pipeline.demo import bundled_model
from llmopt.pipeline.measuring.evaluate import evaluate
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.run import run_plan
from machine import describe

BUDGETS = (3.5, 4.0, 4.5, 5.0)
UNIFORM = (2, 3, 4, 5)


def measure(args: argparse.Namespace, passes: tuple[Step, ...]) -> dict[str, Any]:
    """Quantize in bfloat16, verify and evaluate once."""
    recipe = Recipe(
        model=ModelSpec(id=str(args.model)),
        calibration=CalibrationSpec(data=str(args.calibration), samples=args.samples, length=args.length),
        passes=(Step("cast", {"dtype": "bfloat16"}), *passes),
        exports=(Step("safetensors"),),
    )
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "artifact"
        manifest = run_plan(make_plan(recipe), output, force=False, reporter=Silent())
        found = evaluate(str(output), data=str(args.data), column=None, length=255, limit=args.limit, reporter=Silent())
    source = found["source"]
    counts: dict[int, int] = {}
    for bits in manifest.passes[1].allocation.values():
        counts[bits] = counts.get(bits, 0) + 1
    return {
        "bits_per_weight": manifest.passes[1].metrics.get("weight_bits"),
        "layers": dict(sorted(counts.items())),
        "perplexity": found["perplexity"],
        "loss_increase": source["loss_increase_nats"],
        "kl": source["mean_kl_nats"],
        "kl_stderr": source["mean_kl_stderr_nats"],
        "float32": source["perplexity"],
    }


def between(rows: list[dict[str, Any]], size: float, key: str) -> float | None:
    """Return `key` on the lower convex hull of `rows` at a size; None outside their range."""
    best: float | None = None
    for first in rows:
        for second in rows:
            low, high = first["bits_per_weight"], second["bits_per_weight"]
            if low <= size <= high:
                share = 0.0 if high == low else (size - low) / (high - low)
                value = first[key] + share * (second[key] - first[key])
                best = value if best is None else min(best, value)
    return best


def show(row: dict[str, Any], hull: list[dict[str, Any]]) -> str:
    """Return a line of the table."""
    size = row["bits_per_weight"]
    uniform = [between(hull, size, key) for key in ("perplexity", "kl")] if row["kind"] == "mixed" else [None, None]
    layers = ", ".join(f"{count}x{bits}" for bits, count in row["layers"].items())
    beside = [f"{uniform[0]:.3f}" if uniform[0] else "", f"{1e3 * uniform[1]:.2f}" if uniform[1] else ""]
    return (
        f"| {size:.3f} | {row['kind']} {row['label']} | {row['perplexity']:.3f} | {beside[0]} "
        f"| {1e3 * row['kl']:.2f} ± {1e3 * row['kl_stderr']:.2f} | {beside[1]} | {layers} |"
    )


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Write the size-quality curve as SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "llmopt"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for kind, style in (("uniform", "o--"), ("mixed", "s-")):
        chosen = sorted((row["bits_per_weight"], 1e3 * row["kl"]) for row in rows if row["kind"] == kind)
        axes.plot([x for x, _ in chosen], [y for _, y in chosen], style, label=f"{kind} bits")
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight of the quantized layers, scales included")
    axes.set_ylabel("KL divergence from the source, 1e-3 nats a token")
    axes.set_title(title)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print the table and draw the curve."""
    bundled = bundled_model()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=bundled)
    parser.add_argument("--calibration", type=Path, default=bundled / "calibration.txt")
    parser.add_argument("--data", type=Path, default=bundled / "heldout.txt")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--measure", nargs="+", default=["block", "kl"])
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.svg and find_spec("matplotlib") is None:
        parser.error("--svg needs matplotlib: pip install 'llmopt[bench]'")
    print(f"{describe()}\n{args.model.name}, {args.method}, group size {args.group_size}, ", end="")
    print(f"{args.samples} x {args.length} calibration tokens\n")
    rows: list[dict[str, Any]] = []
    for bits in UNIFORM:
        row = measure(args, (Step(args.method, {"bits": bits, "group_size": args.group_size}),))
        row["bits_per_weight"] = bits + 16 / args.group_size
        rows.append({"kind": "uniform", "label": f"{bits} bits", **row})
    uniform = list(rows)
    print("| bits/weight | what | perplexity | uniform | KL, 1e-3 nats | uniform | layers |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in uniform:
        print(show(row, uniform), flush=True)
    for how in args.measure:
        for budget in BUDGETS:
            survey = Step("allocate-bits", {"budget": f"{budget}bpw", "measure": how})
            row = measure(args, (survey, Step(args.method, {"group_size": args.group_size})))
            rows.append({"kind": "mixed", "label": how, **row})
            print(show(rows[-1], uniform), flush=True)
    print(f"\nfloat32: {rows[0]['float32']:.3f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.svg:
        shown = [row for row in rows if row["kind"] == "uniform" or row["label"] == args.measure[-1]]
        draw(shown, f"{args.model.name}, {args.method}, groups of {args.group_size}", args.svg)


if __name__ == "__main__":
    main()
