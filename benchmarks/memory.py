"""Peak memory and time of quantizing a model that one would rather not hold in memory.

    python benchmarks/memory.py [--layers 22] [--methods rtn gptq] [--threads 1 2] [--curve] [--times 3] [--peers]
                                [--json FILE]

Makes a random bfloat16 Llama of 1.1 billion parameters (hidden 2048, 22 layers, MLP 5632, 32 heads, 4 key/value heads,
vocabulary 32000; 2.2 GB on disk) and runs `llmopt quantize` on it in a process of its own, w4 group 128, 8 windows of
256 tokens for GPTQ. Peak memory is the process's largest resident set (`ru_maxrss`), the interpreter's share included.
`--curve` repeats it with 4, 8 and 16 layers: memory should not follow the number of layers, time should. `--times 3`
takes three times as many layers. What `llmopt plan` predicts stands beside what was measured. `--peers` runs the other
tools behind ours, on the same model and text, with one thread (engines/quantization_peers.sh sets them up; `--repeats`
takes as many turns); what stands in brackets is a multiple of ours in the same turn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from machine import describe

HIDDEN, MLP, HEADS, KV_HEADS, VOCABULARY, LAYERS = 2048, 5632, 32, 4, 32000, 22
ENGINES = Path(__file__).parents[1] / ".build" / "engines"
WORKER = Path(__file__).parent / "engines" / "quantize_worker.py"
PEERS = {
    "rtn": ("llm-compressor", "llm-compressor-model-free"),
    "gptq": ("llm-compressor", "gptqmodel", "llm-compressor-disk"),
}
"""The tools that have a method, by their names in quantize_worker.py."""
TEXT = "The quick brown fox jumps over the lazy dog, {} times a day, and nobody knows why. "


def make_model(folder: Path, layers: int) -> None:
    """Write the model shard by shard; it is never in memory whole either."""
    import torch
    from llmopt.exporters.shards import ShardWriter, TensorSpec

    head = HIDDEN // HEADS
    block = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * head, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * head, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (MLP, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for index in range(layers):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in block.items()}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    generator = torch.Generator().manual_seed(0)
    specs = {name: TensorSpec("torch.bfloat16", shape) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    with ShardWriter(folder, specs, max_shard_bytes=10**9) as writer:
        for name, shape in shapes.items():
            tensor = torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)
            writer.write(name, tensor.to(torch.bfloat16))
    (folder / "config.json").write_text(json.dumps(_config(layers)))
    write_tokenizer(folder)


def _config(layers: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write_tokenizer(folder: Path) -> None:
    """Write a word tokenizer; what the tokens mean does not matter to a random model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *dict.fromkeys(TEXT.replace(",", " ,").replace(".", " .").split())]
    words += [str(number) for number in range(2000)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def run(model: Path, method: str, threads: int) -> dict[str, float]:
    """Quantize in a process of its own; return its peak memory and times."""
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        text = write_text(Path(scratch))
        command = [sys.executable, "-m", "llmopt", "quantize", str(model), "-o", str(Path(scratch) / "out")]
        command += ["--method", method, "--group-size", "128", "--threads", str(threads)]
        if method != "rtn":
            command += ["--calibration", str(text), "--samples", "8", "--length", "256"]
        plan = subprocess.run([*command, "--dry-run", "--json"], check=True, capture_output=True)
        return {**measure(command, threads), "predicted_gib": json.loads(plan.stdout)["peak_bytes"] / 2**30}


def run_peer(tool: str, model: Path, method: str) -> dict[str, float]:
    """Quantize with another tool, in its own environment; see `run`."""
    python = next(ENGINES / name for name in ("gptqmodel", "llm-compressor") if tool.startswith(name))
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        text, out = write_text(Path(scratch)), Path(scratch) / "out"
        command = [str(python / "bin" / "python"), str(WORKER), tool, method, str(model.resolve())]
        return measure([*command, "--text", str(text.resolve()), "--out", str(out.resolve())], 1, Path(scratch))


def write_text(folder: Path) -> Path:
    text = folder / "text.txt"
    text.write_text("".join(TEXT.format(number) for number in range(2000)))
    return text


def measure(command: list[str], threads: int, folder: Path | None = None) -> dict[str, float]:
    """Run a command, in a folder; return its peak memory and times."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(output)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_gib": used.ru_maxrss / 2**20,
    }


def turn(model: Path, method: str, threads: int, peers: bool) -> Iterator[dict[str, Any]]:
    """Run ours, and behind it the others that have the method; each multiple is of ours."""
    ours = run(model, method, threads)
    yield {"tool": "llmopt", **ours}
    for tool in PEERS.get(method, ()) if peers else ():
        theirs = run_peer(tool, model, method)
        yield {"tool": tool, **theirs, "multiples": {name: theirs[name] / ours[name] for name in theirs}}


def show(row: dict[str, Any]) -> str:
    """Return a line of the table."""

    def cell(name: str, form: str) -> str:
        multiple = f" ({row['multiples'][name]:.2f})" if "multiples" in row else ""
        return f"{row[name]:{form}}{multiple}"

    predicted = f"{row['predicted_gib']:.2f}" if "predicted_gib" in row else ""
    cells = [row["method"], str(row["layers"]), row["tool"], f"{row['gigabytes']:.2f}", str(row["threads"])]
    cells += [cell("peak_gib", ".2f"), predicted, cell("seconds", ".0f"), cell("cpu_seconds", ".0f")]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[LAYERS])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--curve", action="store_true", help="also 4, 8 and 16 layers")
    parser.add_argument("--times", type=int, metavar="N", help="also N times as many layers")
    parser.add_argument("--peers", action="store_true", help="run the other tools too; with one thread")
    parser.add_argument("--repeats", type=int, default=1, help="turns of ours and the peers")
    parser.add_argument("--folder", type=Path, help="where to keep the models between runs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.peers and args.threads != [1]:
        parser.error("--peers runs with one thread")
    layers = {*args.layers, *((4, 8, 16) if args.curve else ())}
    layers |= {args.times * max(args.layers)} if args.times else set()
    print(f"{describe()}\n")
    print("| method | layers | tool | size GB | threads | peak GiB | predicted | seconds | CPU seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for method, count, threads in product(args.methods, sorted(layers), args.threads):
            model = (args.folder or Path(scratch)) / f"llama-{count}"
            if not model.exists():
                # In a process of its own: what this one holds would count as the peak of those that it starts.
                making = get_context("spawn").Process(target=make_model, args=(model, count))
                making.start()
                making.join()
            size = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e9
            shape = {"method": method, "layers": count, "gigabytes": size, "threads": threads}
            for _ in range(args.repeats):
                for row in turn(model, method, threads, args.peers):
                    rows.append({**shape, **row})
                    print(show(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
