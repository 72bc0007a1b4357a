"""What learning wins back: layers and neurons removed from a decoder, a 2-bit student, half a sentence encoder.

    python benchmarks/distillation.py depth MODEL --text FILE --data FILE --work DIR [--steps 400]
    python benchmarks/distillation.py width MODEL --text FILE --data FILE --work DIR [--steps 400]
    python benchmarks/distillation.py rounded MODEL --text FILE --data FILE --work DIR [--steps 150]
    python benchmarks/distillation.py encoder MODEL --text FILE --sentences CSV --work DIR [--steps 300]

Students learn from FILE of `--text` and are measured on that of `--data`: windows of 255 tokens after a BOS. `depth`
first tries every pair of layers on the text and removes the one that costs least, `width` takes 30 % of the neurons
out; then the same steps are made with the teacher's answers (kl) and with the text alone (lm). `encoder` keeps every
other layer; `--sentences` holds pairs of sentences with a score, whose Spearman correlation with the cosine of their
embeddings is measured. What lies in DIR already is not made again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from llmopt.calibration.windows import load_windows
from llmopt.core.progress import Silent
from llmopt.core.recipe import CalibrationSpec, ModelSpec, Recipe, Step
from llmopt.models.text import load_tokenizer
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.run import run_plan
from machine import describe
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr


def without_layers(source: Path, place: Path, removed: Sequence[int]) -> Path:
    """Copy a model without some of its layers."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)
    place.chmod(0o755)
    config = json.loads((source / "config.json").read_text())
    kept = [index for index in range(config["num_hidden_layers"]) if index not in removed]
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer = re.match(r"(.*layers?\.)(\d+)(\..*)", name)
        if layer is None:
            tensors[name] = tensor
        elif int(layer[2]) in kept:
            tensors[f"{layer[1]}{kept.index(int(layer[2]))}{layer[3]}"] = tensor
    for name, write in {
        "model.safetensors": lambda path: save_file(tensors, path, {"format": "pt"}),
        "config.json": lambda path: path.write_text(json.dumps(config | {"num_hidden_layers": len(kept)})),
    }.items():
        (place / name).unlink()
        write(place / name)
    return place


def loss_of(model: Any, rows: Sequence[list[int]]) -> float:
    """Return the mean negative log-likelihood of rows of one length, nats."""
    batches = torch.tensor(rows).split(8)
    with torch.no_grad():
        losses = [float(model(batch, labels=batch, use_cache=False).loss) * len(batch) for batch in batches]
    return sum(losses) / len(rows)


def paired(model: Any, whole: Any, rows: Sequence[list[int]]) -> tuple[list[float], list[float]]:
    """Return the loss and the divergence from the whole model of each row, nats a token."""
    losses: list[float] = []
    divergences: list[float] = []
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            ours, theirs = (one(ids, use_cache=False).logits[0, :-1].log_softmax(-1) for one in (model, whole))
        losses.append(float(torch.nn.functional.nll_loss(ours, ids[0, 1:])))
        divergences.append(float((theirs.exp() * (theirs - ours)).sum(-1).mean()))
    return losses, divergences


def opened(folder: Path) -> Any:
    """Open a model, with the adapter that lies beside it where there is one."""
    adapter = folder / "adapter"
    if not adapter.is_dir():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    unpacked = transformers.CompressedTensorsConfig(dequantize=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=unpacked)
    return PeftModel.from_pretrained(base, adapter).eval()


def windows(folder: Path, data: Path, limit: int) -> list[list[int]]:
    return load_windows(str(data), None, load_tokenizer(folder), length=255, limit=limit).rows


def made(work: Path, name: str, recipe: Callable[[], Recipe]) -> tuple[Path, float]:
    """Run a recipe unless its artifact is there, and return the artifact and the seconds it took."""
    place, note = work / name, work / f"{name}.seconds"
    if not place.exists():
        begun = time.monotonic()
        run_plan(make_plan(recipe()), place, force=False, reporter=Silent())
        note.write_text(f"{time.monotonic() - begun:.0f}")
    return place, float(note.read_text()) if note.exists() else float("nan")


def distilled(student: Path, passes: Sequence[Step], calibration: CalibrationSpec | None = None) -> Recipe:
    return Recipe(
        model=ModelSpec(id=str(student)),
        calibration=calibration,
        passes=tuple(passes),
        exports=(Step("safetensors"),),
    )


def best_pair(model: Path, rows: Sequence[list[int]]) -> tuple[int, int]:
    """Return the two layers without which the text is predicted best; prints all pairs."""
    whole = opened(model)
    layers = list(whole.model.layers)
    losses: dict[tuple[int, int], float] = {}
    for pair in itertools.combinations(range(len(layers)), 2):
        whole.model.layers = torch.nn.ModuleList(one for index, one in enumerate(layers) if index not in pair)
        losses[pair] = loss_of(whole, rows)
    for pair, loss in sorted(losses.items(), key=lambda item: item[1]):
        print(f"without layers {pair[0]} and {pair[1]}: {loss:.4f} nats")
    return min(losses, key=lambda pair: losses[pair])


def depth(args: argparse.Namespace) -> None:
    pair = tuple(args.layers) if args.layers else best_pair(args.model, windows(args.model, args.text, 24))
    recovery(args, without_layers(args.model, args.work / "student", pair), f"without layers {pair[0]} and {pair[1]}")


def width(args: argparse.Namespace) -> None:
    calibration = CalibrationSpec(data=str(args.text), samples=64, length=256)
    narrow = [Step("prune-width", {"mlp": "30%"})]
    student, _ = made(args.work, "student", lambda: distilled(args.model, narrow, calibration))
    recovery(args, student, "without 30 % of the neurons")


def recovery(args: argparse.Namespace, student: Path, name: str) -> None:
    """Let a student learn from the whole model, and from text alone, and print what each wins back."""
    common = {
        "teacher": str(args.model),
        "data": str(args.text),
        "length": 256,
        "steps": args.steps,
        "learning_rate": args.rate,
        "evaluate_every": max(1, args.steps // 4),
    }
    rows = windows(args.model, args.data, args.windows)
    before, base = loss_of(opened(student), rows), loss_of(opened(args.model), rows)
    print(f"{describe()}, {torch.get_num_threads()} threads\n\n{args.steps} steps of 8 x 256 tokens\n")
    print("| model | loss, nats | perplexity | won back | seconds |\n| --- | --- | --- | --- | --- |")
    for row, loss in (("whole", base), (name, before)):
        print(f"| {row} | {loss:.4f} | {math.exp(loss):.2f} | | |", flush=True)
    for kind in ("kl", "lm"):
        place, seconds = made(
            args.work, kind, lambda kind=kind: distilled(student, [Step("distill", {**common, kind: 1.0})])
        )
        loss = loss_of(opened(place), rows)
        share = f"{(before - loss) / (before - base):.1%}"
        print(f"| {kind} | {loss:.4f} | {math.exp(loss):.2f} | {share} | {seconds:.0f} |", flush=True)


def rounded(args: argparse.Namespace) -> None:
    calibration = CalibrationSpec(data=str(args.text), samples=64, length=256)
    gptq = Step("gptq", {"bits": 2, "group_size": 32})
    learn = {"data": str(args.text), "length": 256, "steps": args.steps, "learning_rate": args.rate}
    learn["evaluate_every"] = max(1, args.steps // 4)
    rows = windows(args.model, args.data, args.windows)
    print(f"{describe()}\n\n| model | loss, nats | perplexity | won back, 1e-3 nats | KL, 1e-3 nats | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    table: dict[str, tuple[Step, ...]] = {
        "gptq": (gptq,),
        "gptq, adapter": (gptq, Step("distill", {**learn, "learning_rate": args.lora_rate, "lora_rank": args.rank})),
        "gptq, distilled": (gptq, Step("distill", learn)),
    }
    whole = opened(args.model)
    losses, _ = paired(whole, whole, rows)
    print(f"| float32 | {mean(losses):.4f} | {math.exp(mean(losses)):.2f} | | | |")
    before: list[float] = []
    for name, passes in table.items():
        place, seconds = made(
            args.work, name.replace(", ", "-"), lambda passes=passes: distilled(args.model, passes, calibration)
        )
        losses, divergences = paired(opened(place), whole, rows)
        gains = [one - other for one, other in zip(before or losses, losses, strict=True)]
        error = stdev(gains) / math.sqrt(len(gains))
        gain = f"{1e3 * mean(gains):+.2f} ± {1e3 * error:.2f}" if before else ""
        figures = f"{mean(losses):.4f} | {math.exp(mean(losses)):.2f} | {gain} | {1e3 * mean(divergences):.2f}"
        print(f"| {name} | {figures} | {seconds:.0f} |", flush=True)
        before = before or losses


def encoder(args: argparse.Namespace) -> None:
    layers = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
    student = without_layers(args.model, args.work / "student", range(0, layers, 2))
    lines = args.work / "lines.txt"
    text = [line.strip() for line in args.text.read_text().splitlines() if len(line) > 80]
    pairs = [row for row in csv.reader(args.sentences.open(newline="")) if len(row) >= 3 and _is_number(row[2])]
    learnt, pairs = pairs[::2], pairs[1::2]  # what is measured was not read
    lines.write_text("\n".join([*text, *(sentence for row in learnt for sentence in row[:2])]) + "\n")
    learn = {
        "teacher": str(args.model),
        "data": str(lines),
        "length": 64,
        "relation": 1.0,
        "cosine": 10.0,
        "batch_size": 32,
        "steps": args.steps,
        "learning_rate": args.rate,
        "evaluate_every": max(1, args.steps // 4),
    }
    place, seconds = made(args.work, "learnt", lambda: distilled(student, [Step("distill", learn)]))
    print(f"{describe()}\n\n| encoder | layers | Spearman | seconds |\n| --- | --- | --- | --- |")
    for name, folder, count, took in (
        ("whole", args.model, layers, ""),
        ("every other layer", student, layers // 2, ""),
        (f"after {args.steps} steps", place, layers // 2, f"{seconds:.0f}"),
    ):
        print(f"| {name} | {count} | {spearman(folder, pairs):.2f} | {took} |", flush=True)


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def spearman(folder: Path, pairs: Sequence[list[str]]) -> float:
    """Return 100 x the correlation of the cosines of sentence pairs with their scores."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    vectors: list[torch.Tensor] = []
    for side in (0, 1):
        parts: list[torch.Tensor] = []
        for start in range(0, len(pairs), 32):
            batch = tokenizer(
                [row[side] for row in pairs[start : start + 32]], padding=True, truncation=True, return_tensors="pt"
            )
            with torch.no_grad():
                states = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            parts.append((states * mask).sum(1) / mask.sum(1))
        vectors.append(torch.cat(parts))
    cosines = torch.nn.functional.cosine_similarity(*vectors)
    return 100 * float(spearmanr(cosines.numpy(), [float(row[2]) for row in pairs])[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name, steps, rate in (
        ("depth", 400, 1e-3),
        ("width", 400, 1e-3),
        ("rounded", 150, 3e-4),
        ("encoder", 300, 5e-4),
    ):
        one = kinds.add_parser(name)
        one.add_argument("model", type=Path)
        one.add_argument("--text", type=Path, required=True)
        one.add_argument("--work", type=Path, required=True)
        one.add_argument("--steps", type=int, default=steps)
        one.add_argument("--rate", type=float, default=rate)
        one.add_argument("--windows", type=int, default=100)
        if name == "encoder":
            one.add_argument("--sentences", type=Path, required=True)
        else:
            one.add_argument("--data", type=Path, required=True)
        if name == "rounded":
            one.add_argument("--rank", type=int, default=16, help="of the adapter that learns over rounded weights")
            one.add_argument("--lora-rate", type=float, default=2e-3, help="learning rate of the adapter")
        if name == "depth":
            one.add_argument("--layers", type=int, nargs=2, help="remove these; the best pair when left out")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    {"depth": depth, "width": width, "rounded": rounded, "encoder": encoder}[args.kind](args)


if __name__ == "__main__":
    main()
