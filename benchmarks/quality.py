"""Every method on every grid: perplexity, KL divergence, agreement, bytes and seconds, and the orders that must hold.

    python benchmarks/quality.py [MODEL] --calibration FILE --data FILE [--seeds 3] [--limit N] [--only TEXT]
        [--threads 1] [--json F]

The calibration samples are drawn anew for each seed; methods without data have one. Every artifact is a real one:
quantized by `llmopt run`, verified, and opened by transformers, which rounds activations where the artifact says so.
Windows have 255 tokens after a BOS; differences between two artifacts are paired by window. Without MODEL the bundled
model is taken.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llmopt.calibration.windows import load_windows
from llmopt.core.adapter import FOLDER as ADAPTER
from llmopt.core.errors import UsageError
from llmopt.core.progress import Silent
from llmopt.core.recipe import CalibrationSpec, ModelSpec, Recipe, Step
from llmopt.evaluation.perplexity import Scores
from llmopt.models.text import load_tokenizer
from llmopt.pipeline.demo import bundled_model
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.run import run_plan
from llmopt.runtimes import RUNTIMES
from machine import describe

GRIDS: dict[str, dict[str, Any]] = {
    "w4 g32": {"bits": 4, "group_size": 32},
    "w4 g64": {"bits": 4, "group_size": 64},
    "w4 g32 asymmetric": {"bits": 4, "group_size": 32, "symmetric": False},
    "w3 g32": {"bits": 3, "group_size": 32},
    "w3 g32 asymmetric": {"bits": 3, "group_size": 32, "symmetric": False},
    "w2 g32": {"bits": 2, "group_size": 32},
    "w2 g32 asymmetric": {"bits": 2, "group_size": 32, "symmetric": False},
}
METHODS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "rtn": (("rtn", {}),),
    "rtn, mse": (("rtn", {"clip": "mse"}),),
    "hqq": (("hqq", {}),),
    "awq": (("awq", {}),),
    "gptq": (("gptq", {}),),
    "gptq, corrected": (("gptq", {"correction": 0.5}),),
    "awq, gptq": (("awq", {"scales_only": True}), ("gptq", {})),
    "autoround": (("autoround", {}),),
}
WITHOUT_DATA = {"rtn", "rtn, mse", "hqq"}
_INT8 = ("rtn", {"bits": 8, "group_size": "channel"})
_FP8 = ("rtn", {"number": "fp8"})
SCHEMES: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "w8a8-int8 token": (_INT8, ("quantize-activations", {})),
    **{
        f"w8a8-int8 tensor, {observer}": (_INT8, ("quantize-activations", {"scale": "tensor", "observer": observer}))
        for observer in ("minmax", "percentile", "entropy", "mse")
    },
    "smooth, w8a8-int8 tensor, mse": (("smooth", {}), _INT8, ("quantize-activations", {"scale": "tensor"})),
    "w8a8-fp8 token": (_FP8, ("quantize-activations", {"number": "fp8"})),
    "w8a8-fp8 tensor": (_FP8, ("quantize-activations", {"number": "fp8", "scale": "tensor"})),
    "nvfp4 rtn": (("cast", {"dtype": "bfloat16"}), ("rtn", {"number": "nvfp4"})),
    "nvfp4 gptq": (("cast", {"dtype": "bfloat16"}), ("gptq", {"number": "nvfp4"})),
    "mxfp4 rtn": (("cast", {"dtype": "bfloat16"}), ("rtn", {"number": "mxfp4"})),
    "mxfp4 gptq": (("cast", {"dtype": "bfloat16"}), ("gptq", {"number": "mxfp4"})),
    "kv fp8": (("quantize-kv", {}),),
    "kv int8": (("quantize-kv", {"number": "int8"}),),
    **{
        f"w2 g32: gptq, adapter of rank {rank}{words}": (
            ("gptq", GRIDS["w2 g32"]),
            ("extract-adapter", {"rank": rank, "weighting": weighting}),
        )
        for rank in (8, 16, 32)
        for weighting, words in (("covariance", ""), ("none", ", not weighted"))
    },
}
ORDERS = [
    *((f"{grid}: {method}", f"{grid}: rtn") for grid in GRIDS for method in ("gptq", "awq", "autoround")),
    *((f"w4 g32: {method}", f"w4 g64: {method}") for method in METHODS),
    *((f"{grid}: rtn, mse", f"{grid}: rtn") for grid in GRIDS),
    *((f"{grid}: gptq, corrected", f"{grid}: gptq") for grid in GRIDS),
    ("smooth, w8a8-int8 tensor, mse", "w8a8-int8 tensor, mse"),
    *(
        (f"w2 g32: gptq, adapter of rank {rank}", f"w2 g32: gptq{other}")
        for rank in (8, 16, 32)
        for other in (
            "",
            f", adapter of rank {rank}, not weighted",
            *((f", adapter of rank {rank // 2}",) * (rank > 8)),
        )
    ),
]
"""Pairs of which the first must have the smaller divergence in every seed."""


@dataclass(frozen=True, slots=True)
class Run:
    """One artifact.

    Attributes:
        perplexity: of all windows.
        top1: share of positions where it and the source put the same token first.
        size: bytes of its weights.
        seconds: from the recipe to the verified artifact.
        losses: mean loss of each window, nats.
        divergences: mean KL divergence of each window from the source, nats.
    """

    perplexity: float
    top1: float
    size: int
    seconds: float
    losses: list[float]
    divergences: list[float]


class Bench:
    """The model, the text, and the source's answers to it, which stay the same for all rows of the table."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        windows = load_windows(str(args.data), None, load_tokenizer(args.model), length=255, limit=args.limit)
        self._rows = [np.array([row], dtype=np.int64) for row in windows.rows]
        self._source = self._answers(args.model)
        losses = Scores()
        for ids, logits in zip(self._rows, self._source, strict=True):
            losses.add(ids, logits)
        self.source_losses = losses.losses
        self.source_perplexity = losses.report()["perplexity"]

    def run(self, passes: tuple[tuple[str, dict[str, Any]], ...], seed: int) -> Run:
        """Quantize, verify and evaluate once."""
        args = self._args
        recipe = Recipe(
            model=ModelSpec(id=str(args.model)),
            calibration=CalibrationSpec(data=str(args.calibration), samples=args.samples, length=args.length),
            passes=tuple(Step(name, params) for name, params in passes),
            exports=(Step("safetensors"),),
            seed=seed,
            threads=args.threads,
        )
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "artifact"
            began = time.perf_counter()
            run_plan(make_plan(recipe), output, force=False, reporter=Silent())
            seconds = time.perf_counter() - began
            scores = Scores()
            for ids, made, expected in zip(self._rows, self._answers(output), self._source, strict=True):
                scores.add(ids, made, expected)
            size = sum(path.stat().st_size for path in output.rglob("*.safetensors"))
        report = scores.report()
        return Run(
            perplexity=report["perplexity"],
            top1=report["source"]["top1_agreement"],
            size=size,
            seconds=seconds,
            losses=scores.losses,
            divergences=scores.divergences,
        )

    def _answers(self, folder: Path) -> list[Any]:
        session = RUNTIMES.load("transformers")().open(folder)
        if (folder / ADAPTER).is_dir():
            session.adapt(folder / ADAPTER)
        try:
            return [session.outputs({"input_ids": ids})["logits"] for ids in self._rows]
        finally:
            session.close()


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def differences(first: list[float], second: list[float]) -> list[float]:
    """Return first - second, window by window."""
    return [one - other for one, other in zip(first, second, strict=True)]


def line(name: str, runs: list[Run], bench: Bench) -> str:
    """Return a line of the table: medians over seeds, standard errors of the first."""
    first = runs[0]
    increases = [statistics.fmean(differences(run.losses, bench.source_losses)) for run in runs]
    _, error = mean_and_error(differences(first.losses, bench.source_losses))
    _, kl_error = mean_and_error(first.divergences)
    kl = statistics.median(statistics.fmean(run.divergences) for run in runs)
    return (
        f"| {name} | {len(runs)} | {statistics.median(run.perplexity for run in runs):.3f} "
        f"| {1e3 * statistics.median(increases):+.2f} ± {1e3 * error:.2f} | {1e3 * kl:.3f} ± {1e3 * kl_error:.3f} "
        f"| {100 * statistics.median(run.top1 for run in runs):.2f} % | {first.size / 2**20:.2f} "
        f"| {statistics.median(run.seconds for run in runs):.1f} |"
    )


def order(first: str, second: str, runs: dict[str, list[Run]]) -> str | None:
    """Return a line on whether `first` diverges less than `second` in every seed; None when one was not measured."""
    if first not in runs or second not in runs:
        return None
    seeds = max(len(runs[first]), len(runs[second]))
    pairs = [(runs[first][seed % len(runs[first])], runs[second][seed % len(runs[second])]) for seed in range(seeds)]
    by_kl = [mean_and_error(differences(one.divergences, other.divergences)) for one, other in pairs]
    by_loss = [mean_and_error(differences(one.losses, other.losses)) for one, other in pairs]
    worst, loss = max(by_kl), max(by_loss)
    holds = "yes" if all(mean < 0 for mean, _ in by_kl) else "no"
    clear = "clearly" if all(mean < -2 * error for mean, error in by_kl) else "within two errors"
    return (
        f"| {first} | {second} | {holds} | {1e3 * worst[0]:+.3f} ± {1e3 * worst[1]:.3f}, {clear} "
        f"| {1e3 * loss[0]:+.2f} ± {1e3 * loss[1]:.2f} |"
    )


def main() -> None:
    """Print the tables."""
    bundled = bundled_model()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=bundled)
    parser.add_argument("--calibration", type=Path, default=bundled / "calibration.txt")
    parser.add_argument("--data", type=Path, default=bundled / "heldout.txt")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--limit", type=int, default=100, help="windows of text, 100 by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="that the artifacts are made with")
    parser.add_argument("--only", action="append", help="rows whose name holds this text; may be given several times")
    parser.add_argument("--json", type=Path, help="keep all runs there; those that it holds are not repeated")
    args = parser.parse_args()

    wanted = {f"{grid}: {method}": (METHODS[method], GRIDS[grid], method) for grid in GRIDS for method in METHODS}
    wanted |= {name: (passes, None, name) for name, passes in SCHEMES.items()}
    bench = Bench(args)
    print(f"{describe()}\n{args.model.name}, {args.samples} x {args.length} calibration tokens\n")
    print("| artifact | seeds | perplexity | loss increase, 1e-3 | KL, 1e-3 nats | same first token | MiB | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    kept = json.loads(args.json.read_text(encoding="utf-8")) if args.json and args.json.is_file() else {}
    runs = {name: [Run(**run) for run in made] for name, made in kept.items()}
    for name, (passes, grid, method) in wanted.items():
        if args.only and not any(text in name for text in args.only):
            continue
        steps = tuple((one, {**(grid or {}), **params}) for one, params in passes)
        data = method not in WITHOUT_DATA and (grid is not None or "rtn" not in method or "tensor" in method)
        try:
            if name not in runs:
                runs[name] = [bench.run(steps, seed) for seed in range(args.seeds if data else 1)]
        except UsageError as error:
            print(f"| {name} | refused: {error.what} | | | | | | |", flush=True)
            continue
        print(line(name, runs[name], bench), flush=True)
        if args.json:
            document = {one: [asdict(run) for run in made] for one, made in runs.items()}
            args.json.write_text(json.dumps(document) + "\n", encoding="utf-8")
    print(f"\nsource: {bench.source_perplexity:.3f} on {len(bench.source_losses)} windows\n")
    print("| less divergent | than | holds | worst difference of KL, 1e-3 | of the loss, 1e-3 |")
    print("| --- | --- | --- | --- | --- |")
    for first, second in ORDERS:
        if (text := order(first, second, runs)) is not None:
            print(text)


if __name__ == "__main__":
    main()
