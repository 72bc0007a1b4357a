"""Speed of a language model's float32 graph: ours, ours without fused operators, and ORT GenAI's own.

    python benchmarks/decoder.py [MODEL ...] [--random] [--prompt 256] [--tokens 32] [--repeats 9] [--folder DIR]

Each graph is exported and verified as by `llmopt run`, and measured on one thread, in turns: every repeat runs each
of them once. Speeds are of processor time, which work of others on the machine disturbs least; medians over the
repeats. The ratio is the median of the ratios to GenAI's graph in the same repeat. All run through ONNX Runtime with
the cache left in its hands; GenAI's graph is run by GenAI's own generator too. A prompt's logits are computed for its
last token only, except where it says `all logits`. `--random` adds a random Llama of 88 million parameters. Without
MODEL the bundled model is taken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import onnxruntime
from llmopt.core.progress import Silent
from llmopt.core.recipe import ModelSpec, Recipe, Step
from llmopt.core.runtime import Session
from llmopt.pipeline.demo import bundled_model
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.run import run_plan
from llmopt.runtimes import RUNTIMES
from llmopt.runtimes.onnxruntime_ import OnnxSession
from machine import describe

LAST = {"last_logits": True}
EXPORTS: dict[str, tuple[tuple[Step, ...], Step]] = {
    "fused": ((), Step("onnx", LAST)),
    "fused, padding left": ((Step("fuse", {"padding": "left"}),), Step("onnx", LAST)),
    "fused, padding right": ((Step("fuse", {"padding": "right"}),), Step("onnx", LAST)),
    "fused, all logits": ((), Step("onnx", {})),
    "not fused": ((), Step("onnx", LAST | {"fuse": False})),
    "GenAI's graph": ((), Step("onnx-genai", {})),
}
BASE, GENERATOR = "GenAI's graph", "GenAI's graph, its generator"


def random_model(folder: Path) -> Path:
    """Write a random Llama of 88 million parameters."""
    import torch
    import transformers
    from memory import write_tokenizer

    config = transformers.LlamaConfig(
        vocab_size=8000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def export(model: Path, name: str, folder: Path) -> Path:
    """Write an artifact, unless it is there."""
    output = folder / f"{model.name}-{name.replace(' ', '-').replace(',', '')}"
    if not output.exists():
        passes, step = EXPORTS[name]
        recipe = Recipe(model=ModelSpec(id=str(model)), passes=passes, exports=(step,))
        run_plan(make_plan(recipe), output, force=False, reporter=Silent())
    return output


def load(folder: Path) -> Session:
    """Open a graph in ONNX Runtime; GenAI's leaves the head size open."""
    config = json.loads((folder / "config.json").read_text())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_free_dimension_override_by_name("kv_cache_dim", config["head_dim"])
    return OnnxSession(onnxruntime.InferenceSession(str(folder / "model.onnx"), options), folder)


def measure(session: Session, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Return processor seconds of the prompt, and of a later token."""
    started = time.process_time()
    session.generate(prompt, 1)
    first = time.process_time() - started
    started = time.process_time()
    session.generate(prompt, tokens + 1)
    return first, (time.process_time() - started - first) / tokens


def compare(model: Path, folder: Path, *, length: int, tokens: int, repeats: int) -> None:
    """Print the rows of a model."""
    artifacts = {name: export(model, name, folder) for name in EXPORTS}
    sessions: dict[str, Session] = {name: load(path) for name, path in artifacts.items()}
    sessions[GENERATOR] = RUNTIMES.load("onnx-genai")().open(artifacts[BASE], threads=1)
    prompt = [3 + (7 * place) % 1000 for place in range(length)]
    answers = {tuple(session.generate(prompt, tokens)) for session in sessions.values()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
    for _ in range(repeats):
        for name, session in sessions.items():
            times[name].append(measure(session, prompt, tokens))
    for name, each in times.items():
        prefill, decode = (statistics.median(one[kind] for one in each) for kind in (0, 1))
        ratios = [
            statistics.median(base[kind] / one[kind] for one, base in zip(each, times[BASE], strict=True))
            for kind in (0, 1)
        ]
        row = [model.name, name, f"{length / prefill:.0f}", f"{ratios[0]:.2f}", f"{1 / decode:.1f}", f"{ratios[1]:.2f}"]
        print("|", " | ".join(row), "|", flush=True)
    print(f"| {model.name} | greedy tokens | {'all alike' if len(answers) == 1 else 'differ'} | | | |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--random", action="store_true", help="also a random Llama of 88 million parameters")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where to keep the graphs between runs")
    args = parser.parse_args()
    print(f"{describe()}\n\n{args.prompt} tokens of prompt, {args.tokens} new, {args.repeats} repeats\n")
    print("| model | graph | prefill tokens/s | ratio | decode tokens/s | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        models = args.models or ([] if args.random else [bundled_model()])
        if args.random:
            made = folder / "random-88m"
            models.append(made if made.exists() else random_model(made))
        for model in models:
            compare(model, folder, length=args.prompt, tokens=args.tokens, repeats=args.repeats)


if __name__ == "__main__":
    main()
