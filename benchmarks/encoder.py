"""Sentences a second of an encoder: our artifacts and the other ways to run it on a CPU, in turns in one run.

    benchmarks/engines/encoder_peers.sh
    python benchmarks/encoder.py MODEL --stsb FILE --text FILE [--ours NAME=DIR[@ENGINE] ...] [--only TEXT ...]
        [--threads 1 2] [--parallel 1 2] [--orders file length] [--rounds 3] [--every 1] [--forms DIR] [--json FILE]

STSB is a CSV of sentence1, sentence2, score without a header (STS-B dev); TEXT is plain text, of which the first 600
lines longer than 20 characters are taken as paragraphs (wikitext-2 test). Texts are cut at 256 tokens and go in batches
of 32, in the order of the file or by length. A text's time holds tokenizing, padding, the model, mean pooling and
normalising. ENGINE is onnxruntime (if not given), openvino or openvino-bf16. MODEL is a folder with weights and
`tokenizer.json`; without it nothing is measured.

Every engine is a process of its own, loaded once and timed on command. They take turns by slices of eight batches, so
that whatever else the machine does falls on all of them alike; a slice's time is the median of the rounds. A first
pass, which sees every shape for the first time, is not among them and stands on its own in the JSON; with `--rounds 0`
it is all there is, as in a service that has just started. Threads work together on a batch or are divided among as many
batches at a time as --parallel says; every engine is measured both ways. "of best" divides ours by the best peer of its
precision in that column, whichever way that is. The share of the peak is that of the linear layers alone, on real
tokens, of what large float32 matrices reach in the same run on these cores.

Spearman's correlation, times 100, is over the pairs that were measured. `alone` is the largest difference of an
embedding made alone from the one made in a batch.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

ROOT = Path(__file__).parents[1]
HERE, ENGINES = Path(__file__).parent / "engines", ROOT / ".build" / "engines"
BATCH, LENGTH, PARAGRAPHS, SLICE, ALONE = 32, 256, 600, 8, 64
OURS = "llmopt"


@dataclass(frozen=True)
class Entry:
    """Something to measure: an engine, and the form of the model that it opens."""

    name: str
    engine: str
    form: str
    precision: str
    environment: str = OURS

    @property
    def python(self) -> str:
        """The interpreter of its environment."""
        return sys.executable if self.environment == OURS else str(ENGINES / self.environment / "bin" / "python")


PEERS = (
    Entry("torch", "torch", "model", "float32"),
    Entry("transformers.exporters, ONNX Runtime", "onnxruntime", "exporters", "float32"),
    Entry("optimum-onnx O3", "onnxruntime", "optimum-o3", "float32"),
    Entry("OpenVINO", "openvino", "optimum", "float32", "openvino"),
    Entry("CTranslate2", "ctranslate2", "ctranslate2", "float32", "optimum-onnx"),
    Entry("OpenVINO bf16", "openvino-bf16", "optimum", "bfloat16", "openvino"),
    Entry("optimum-onnx INT8 avx512_vnni", "onnxruntime", "optimum-int8", "int8"),
    Entry("OpenVINO INT8, NNCF", "openvino", "nncf", "int8", "openvino"),
    Entry("CTranslate2 INT8", "ctranslate2-int8", "ctranslate2", "int8", "optimum-onnx"),
)
# form: the environment that makes it, and the form that it is made of
FORMS = {
    "exporters": (OURS, None),
    "optimum": ("optimum-onnx", None),
    "optimum-o3": ("optimum-onnx", "optimum"),
    "optimum-int8": ("optimum-onnx", "optimum"),
    "ctranslate2": ("optimum-onnx", None),
    "nncf": ("openvino", "optimum"),
}


@dataclass(frozen=True)
class Data:
    """The texts of both columns, and the scores of the first's pairs."""

    texts: dict[str, list[str]]
    scores: list[float]
    tokens: dict[str, list[int]]

    def batches(self, column: str, order: str, every: int) -> list[list[str]]:
        """Cut a column's texts into batches, and take every Nth of them."""
        texts, tokens = self.texts[column], self.tokens[column]
        at = sorted(range(len(texts)), key=tokens.__getitem__) if order == "length" else list(range(len(texts)))
        cut = [[texts[index] for index in at[start : start + BATCH]] for start in range(0, len(at), BATCH)]
        return cut[::every]


def read(stsb: Path, text: Path, tokenizer_file: Path) -> Data:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    with stsb.open(newline="") as file:
        rows = list(csv.reader(file))
    lines = (line.strip() for line in text.read_text().splitlines())
    texts = {
        "STS-B": [sentence for row in rows for sentence in row[:2]],
        "paragraphs": [line for line in lines if len(line) > 20][:PARAGRAPHS],
    }
    tokens = {name: [len(one.ids) for one in tokenizer.encode_batch(some)] for name, some in texts.items()}
    return Data(texts, [float(row[2]) for row in rows], tokens)


def make_forms(entries: list[Entry], model: Path, forms: Path, data: Data) -> None:
    """Make what is not in the folder yet. NNCF calibrates on a sample of what is measured, in its favour."""
    texts = forms / "calibration.json"
    texts.write_text(json.dumps(data.texts["STS-B"][::15] + data.texts["paragraphs"][::6]))
    needed = list(dict.fromkeys(entry.form for entry in entries if entry.form in FORMS))
    for form in [*(source for _, source in map(FORMS.__getitem__, needed) if source), *needed]:
        environment, source = FORMS[form]
        if (forms / form).exists():
            continue
        python = Entry("", "", form, "", environment).python
        command = [python, str(HERE / "encoder_prepare.py"), form, str(model), str(forms / f"{form}.part")]
        command += ["--length", str(LENGTH), "--texts", str(texts)]
        command += ["--source", str(forms / source)] if source else []
        print(f"making {form}", file=sys.stderr)
        made = subprocess.run(command, check=False, capture_output=True, text=True)
        if made.returncode:
            raise SystemExit(f"{form} could not be made:\n{made.stderr}")
        (forms / f"{form}.part").rename(forms / form)


@dataclass
class Worker:
    """An engine's process."""

    entry: Entry
    process: subprocess.Popen[str]
    first: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, entry: Entry, path: Path, tokenizer: Path, threads: int, parallel: int = 1) -> Worker:
        """Start the process and wait until the model is loaded."""
        command = [entry.python, str(HERE / "encoder_worker.py"), entry.engine, str(path)]
        command += ["--tokenizer", str(tokenizer), "--threads", str(threads), "--length", str(LENGTH)]
        command += ["--parallel", str(parallel)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        worker = cls(entry, process)
        worker.answer()
        return worker

    def answer(self) -> dict[str, Any]:
        """Read the next line of the process."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.entry.name} ended with status {self.process.wait()}: {self.process.args}")
        return json.loads(line)

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Give an order and wait for its answer."""
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return self.answer()

    def stop(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def timed(workers: list[Worker], batches: list[list[str]], rounds: int) -> list[tuple[float, float]]:
    """Return each worker's texts a second: the median of the rounds, and the first pass."""
    slices = [batches[start : start + SLICE] for start in range(0, len(batches), SLICE)]
    usual, first = [0.0] * len(workers), [0.0] * len(workers)
    for some in slices:
        seconds: list[list[float]] = [[] for _ in workers]
        for number in range(rounds + 1):
            turn = number % len(workers)  # nobody always follows the same neighbour after a pause
            for at in [*range(turn, len(workers)), *range(turn)]:
                seconds[at].append(workers[at].ask({"batches": some})["seconds"])
        for at, (seen, *later) in enumerate(seconds):
            first[at] += seen
            usual[at] += statistics.median(later or [seen])
    texts = sum(map(len, batches))
    return [(texts / middle, texts / seen) for middle, seen in zip(usual, first, strict=True)]


def quality(worker: Worker, data: Data, every: int) -> dict[str, float]:
    """Return Spearman's correlation on the pairs, and how much an embedding depends on its batch."""
    from scipy.stats import spearmanr

    batches = data.batches("STS-B", "file", every)
    # A batch holds whole pairs, and so many scores.
    scores = [data.scores[start : start + BATCH // 2] for start in range(0, len(data.scores), BATCH // 2)][::every]
    texts = [text for batch in batches for text in batch]
    with tempfile.TemporaryDirectory() as folder:
        together, alone = Path(folder) / "together.npy", Path(folder) / "alone.npy"
        worker.ask({"batches": batches, "save": str(together)})
        worker.ask({"batches": [[text] for text in texts[:ALONE]], "save": str(alone)})
        rows, single = np.load(together), np.load(alone)
    cosines = (rows[0::2] * rows[1::2]).sum(1)
    return {
        "spearman": 100 * float(spearmanr(cosines, np.concatenate(scores))[0]),
        "alone": float(np.abs(rows[: len(single)] - single).max()),
    }


def linear_flops(model: Path) -> int:
    """Return the operations of the linear layers for a token."""
    config = json.loads((model / "config.json").read_text())
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    return config["num_hidden_layers"] * 2 * (4 * hidden**2 + 2 * hidden * mlp)


def ours(text: str) -> tuple[Entry, Path]:
    name, _, rest = text.partition("=")
    folder, _, engine = rest.partition("@")
    path, engine = Path(folder), engine or "onnxruntime"
    graph = next((each for each in (path, path / "model.onnx", path / "openvino_model.xml") if each.is_file()), None)
    if graph is None:
        raise argparse.ArgumentTypeError(f"there is no model.onnx or openvino_model.xml in {path}")
    content = graph.read_bytes()
    words = (b"QuantizeLinear", b"MatMulInteger", b"MatMulNBits", b"FakeQuantize")
    quantized = any(name in content for name in words)
    precision = "int8" if quantized else "bfloat16" if engine.endswith("bf16") else "float32"
    environment = "openvino" if engine.startswith("openvino") else OURS
    return Entry(f"{name}, {engine}", engine, "ours", precision, environment), path


def show(rows: list[dict[str, Any]], columns: list[str]) -> None:
    titles = " | ".join(f"{column} /s | peak" for column in columns)
    print(f"| engine | precision | batches at a time | {titles} | Spearman | alone |")
    print("| --- | --- | --- | " + "--- | --- | " * len(columns) + "--- | --- |")
    for row in rows:
        cells: list[str] = []
        for column in columns:
            rate = f"{row['rates'][column]:.1f}"
            if row["ours"]:
                peers = [
                    one["rates"][column] for one in rows if not one["ours"] and one["precision"] == row["precision"]
                ]
                rate += f" ({row['rates'][column] / max(peers):.2f} of best)" if peers else ""
            cells += [rate, f"{row['peak'][column]:.2f}"]
        print(f"| {row['name']} | {row['precision']} | {row['parallel']} | {' | '.join(cells)} | ", end="")
        print(f"{row['spearman']:.2f} | {row['alone']:.0e} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--stsb", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--ours", type=ours, action="append", default=[], metavar="NAME=DIR[@ENGINE]")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="the peers whose names hold a TEXT")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--parallel", type=int, nargs="+", default=[1, 2], help="those that divide the threads")
    parser.add_argument("--orders", nargs="+", choices=["file", "length"], default=["file", "length"])
    parser.add_argument("--rounds", type=int, default=3, help="0: the first pass alone, each batch once")
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="every Nth batch only, for a quick look",
    )
    parser.add_argument("--forms", type=Path, default=ROOT / ".build" / "encoder", help="where to keep peers' models")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not (args.model and args.stsb and args.text):
        print("nothing to measure: MODEL, --stsb and --text are needed")
        return
    model = args.model.resolve()
    tokenizer = model / "tokenizer.json"
    data = read(args.stsb, args.text, tokenizer)
    peers = [entry for entry in PEERS if any(text in entry.name for text in args.only)]
    args.forms.mkdir(parents=True, exist_ok=True)
    make_forms(peers, model, args.forms, data)
    paths = {entry: model if entry.form == "model" else args.forms / entry.form for entry in peers} | dict(args.ours)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    print(f"{describe()}\n")
    print(
        ", ".join(f"{name}: {len(counts)} texts, {np.mean(counts):.1f} tokens" for name, counts in data.tokens.items())
    )
    report: list[dict[str, Any]] = []
    for threads in args.threads:
        if threads > cores:
            print(f"\n{threads} threads: this process may use {cores} of the cores only")
            continue
        report += measure(paths, data, threads, args, linear_flops(model))
    if args.json:
        args.json.write_text(json.dumps({"machine": describe(), "rows": report}, indent=1) + "\n")


def measure(
    paths: dict[Entry, Path], data: Data, threads: int, args: argparse.Namespace, flops: int
) -> list[dict[str, Any]]:
    """Print the table for a number of threads; return its rows."""
    tokenizer = args.model / "tokenizer.json"
    meter = Worker.start(Entry("peak", "peak", "", ""), Path(), tokenizer, threads)
    ways = [(entry, parallel) for entry, parallel in product(paths, args.parallel) if threads % parallel == 0]
    workers = [Worker.start(entry, paths[entry], tokenizer, threads, parallel) for entry, parallel in ways]
    peaks = [meter.ask({})["flops"]]
    columns: list[str] = []
    rates: list[dict[str, float]] = [{} for _ in workers]
    first: list[dict[str, float]] = [{} for _ in workers]
    tokens: dict[str, float] = {}
    for order, name in product(args.orders, data.texts):
        column = name if order == "file" else f"{name} by length"
        columns.append(column)
        tokens[column] = float(np.mean(data.tokens[name]))
        for at, (usual, seen) in enumerate(timed(workers, data.batches(name, order, args.every), args.rounds)):
            rates[at][column], first[at][column] = usual, seen
        peaks.append(meter.ask({})["flops"])
    peak = max(peaks)
    rows = [
        {
            "threads": threads,
            "parallel": ways[at][1],
            "name": worker.entry.name,
            "engine": worker.entry.engine,
            "precision": worker.entry.precision,
            "ours": worker.entry.form == "ours",
            "rates": rates[at],
            "first": first[at],
            "peak": {column: rates[at][column] * tokens[column] * flops / peak for column in columns},
            **quality(worker, data, args.every),
        }
        for at, worker in enumerate(workers)
    ]
    for worker in [meter, *workers]:
        worker.stop()
    print(f"\n{threads} thread{'s' if threads > 1 else ''}; float32 peak {peak / 1e9:.0f} GFLOP/s\n")
    show(rows, columns)
    return rows


if __name__ == "__main__":
    main()
