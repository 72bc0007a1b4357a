"""Peak memory and time of quantizing a model that one would rather not hold in memory.

    python benchmarks/memory.py [--layers 22] [--methods rtn gptq] [--threads 1] [--curve] [--json FILE]

Makes a random bfloat16 Llama of 1.1 billion parameters (hidden 2048, 22 layers, MLP 5632, 32 heads, 4 key/value heads,
vocabulary 32000; 2.2 GB on disk) and runs `llmopt quantize` on it in a process of its own, w4 group 128, 8 windows of
256 tokens for GPTQ. Peak memory is the process's largest resident set (`ru_maxrss`), the interpreter's share included.
`--curve` repeats it with 4, 8 and 16 layers: memory should not follow the number of layers, time should.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe

HIDDEN, MLP, HEADS, KV_HEADS, VOCABULARY, LAYERS = 2048, 5632, 32, 4, 32000, 22
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
    _tokenizer(folder)


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


def _tokenizer(folder: Path) -> None:
    """Write a word tokenizer; what the tokens mean does not matter to a random model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *dict.fromkeys(TEXT.replace(",", " ,").replace(".", " .").split())]
    words += [str(number) for number in range(2000)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def run(model: Path, method: str, threads: int, *, keep: Path | None = None) -> dict[str, float]:
    """Quantize in a process of its own; return its peak memory and times."""
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text("".join(TEXT.format(number) for number in range(2000)))
        command = [sys.executable, "-m", "llmopt", "quantize", str(model), "-o", str(keep or Path(scratch) / "out")]
        command += ["--method", method, "--group-size", "128"]
        if method != "rtn":
            command += ["--calibration", str(text), "--samples", "8", "--length", "256"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        output, _ = process.communicate()
        seconds = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            raise SystemExit(output)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_gib": after.ru_maxrss / 2**20}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[LAYERS])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--curve", action="store_true", help="also 4, 8 and 16 layers")
    parser.add_argument("--folder", type=Path, help="where to keep the models between runs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{describe()}, {args.threads} thread(s)\n")
    print("| method | layers | size GB | peak GiB | seconds | CPU seconds |\n| --- | --- | --- | --- | --- | --- |")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for method in args.methods:
            for layers in sorted({4, 8, 16, *args.layers}) if args.curve else args.layers:
                model = (args.folder or Path(scratch)) / f"llama-{layers}"
                if not model.exists():
                    # ru_maxrss is of the largest child so far: each method runs from small to large
                    make_model(model, layers)
                size = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e9
                row = {"method": method, "layers": layers, "gigabytes": size, **run(model, method, args.threads)}
                rows.append(row)
                print(
                    f"| {method} | {layers} | {size:.2f} | {row['peak_gib']:.2f} | {row['seconds']:.0f} "
                    f"| {row['cpu_seconds']:.0f} |",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
