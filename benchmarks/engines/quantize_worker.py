"""Quantize a model with another tool; runs in the tool's own environment (see quantization_peers.sh), without llmopt.

    .build/engines/TOOL/bin/python benchmarks/engines/quantize_worker.py TOOL METHOD MODEL --text FILE --out FOLDER

Four bits, symmetric, groups of 128, the head left alone; everything else is the tool's default. `llm-compressor` loads
as its guide recommends for models larger than the accelerator: on the CPU, and block by block from there.
`llm-compressor-disk` leaves on disk what its `auto_offload` allows, and `llm-compressor-model-free` is its entry point
that needs no model in memory and no calibration.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# GPTQModel starts a worker for every other core and does not load with fewer than two.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


def windows(model: str, text: str, samples: int, length: int) -> list[list[int]]:
    """Cut windows of `length` tokens, evenly spread over a text."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(Path(text).read_text(), verbose=False)["input_ids"]
    step = (len(ids) - length) // samples
    return [ids[index * step : index * step + length] for index in range(samples)]


def llm_compressor(chosen: argparse.Namespace, *, offload: bool = False) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = GPTQModifier if chosen.method == "gptq" else QuantizationModifier
    recipe = kind(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    calibration = {}
    if chosen.method == "gptq":
        rows = windows(chosen.model, chosen.text, chosen.samples, chosen.length)
        data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
        calibration = {
            "dataset": data,
            "num_calibration_samples": chosen.samples,
            "max_seq_length": chosen.length,
            "shuffle_calibration_samples": False,
        }
    with tempfile.TemporaryDirectory(dir=chosen.out) as scratch:
        if offload:
            from compressed_tensors.offload import load_offloaded_model

            with load_offloaded_model():
                model = AutoModelForCausalLM.from_pretrained(
                    chosen.model,
                    dtype="auto",
                    device_map="auto_offload",
                    max_memory={"cpu": chosen.offload_bytes},
                    offload_folder=scratch,
                )
        else:
            model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype="auto")
        oneshot(model=model, tokenizer=AutoTokenizer.from_pretrained(chosen.model), recipe=recipe, **calibration)
        model.save_pretrained(chosen.out, save_compressed=True)


def model_free(chosen: argparse.Namespace) -> None:
    from llmcompressor import model_free_ptq

    ignored = ["lm_head", "re:.*embed_tokens"]
    model_free_ptq(chosen.model, chosen.out, scheme="W4A16", ignore=ignored, max_workers=1, device="cpu")


def gptqmodel(chosen: argparse.Namespace) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    rows = windows(chosen.model, chosen.text, chosen.samples, chosen.length)
    model = GPTQModel.load(chosen.model, QuantizeConfig(bits=4, group_size=128, sym=True), device="cpu")
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
    model.save(chosen.out)


TOOLS = {
    "llm-compressor": llm_compressor,
    "llm-compressor-disk": lambda chosen: llm_compressor(chosen, offload=True),
    "llm-compressor-model-free": model_free,
    "gptqmodel": gptqmodel,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("method", choices=("rtn", "gptq"))
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--offload-bytes", type=int, default=300 * 2**20, help="weights kept in memory with -disk")
    chosen = parser.parse_args()
    Path(chosen.out).mkdir(parents=True, exist_ok=True)
    TOOLS[chosen.tool](chosen)


if __name__ == "__main__":
    main()
