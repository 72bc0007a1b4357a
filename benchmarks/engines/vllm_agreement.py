"""Do the artifacts give vLLM the tokens of our reference? Greedy generation, artifact by artifact.

    benchmarks/engines/vllm_cpu.sh
    python benchmarks/engines/vllm_agreement.py [MODEL ...] [--data FILE] [--only NAME ...] [--markdown FILE]

Each artifact is built by `llmopt run` (rtn), loaded in vLLM, and continues 20 prompts by 32 tokens.
The reference is the same quantized model, dequantized (format plain), in transformers, in float32, with the artifact's
adapter in peft where it has one ("without" in the JSON: same tokens as the reference without it); where the artifact
says that activations are rounded, the artifact itself there, which rounds them too. For those there is a second
reference, which rounds as the engine's kernels do (vllm_arithmetic.py): what it explains is the engine's own way.

Two figures, because one different token changes all that follow: the share of tokens that are the reference's own, and
the share that the reference would have chosen in the same context. The largest gap says how far, in logits, a token of
the engine lies behind the reference's choice: near ties fall either way when an engine computes in half precision.
"log p" is the median difference of the logarithms of the probabilities that engine and reference give the engine's
tokens, in the same context; "itself" the tokens that the second reference keeps when what it rounds is changed by what
the engine's dtype changes it by (median of three). Loading takes a minute or two each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from llmopt.core.progress import Silent
from llmopt.core.recipe import CalibrationSpec, ModelSpec, Recipe, Step
from llmopt.pipeline.demo import bundled_model
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.run import run_plan
from llmopt.runtimes.transformers_ import load

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from machine import describe  # noqa: E402
from vllm_arithmetic import simulate  # noqa: E402

ENGINE = ROOT / ".build" / "engines" / "vllm" / "bin" / "python"
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 20, 32, 32
ERRORS = {"float32": 1e-6, "float16": 3e-4, "bfloat16": 1e-3}
"""Relative errors of an activation: another order of summation in float32, half a bit otherwise, root mean square."""


@dataclass(frozen=True)
class Case:
    """An artifact and the dtype that the engine is asked to compute in."""

    name: str
    format: str
    dtype: str
    grid: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] | None = None
    cache: str | None = None
    adapter: Step | None = None

    @property
    def rounds(self) -> bool:
        """Whether activations are rounded."""
        return self.inputs is not None or self.cache is not None


LEARNT = Step("distill", {"length": 128, "steps": 20, "learning_rate": 3e-3, "lora_rank": 16})
"""An adapter that learns over the rounded layers, long enough to change tokens."""
FOUND = Step("extract-adapter", {"rank": 24})
"""One that is found, of a rank that the engine must be asked for."""


def w(bits: int, group_size: int | str, *, symmetric: bool = True) -> dict[str, Any]:
    return {"bits": bits, "group_size": group_size, "symmetric": symmetric}


CASES = [
    Case("plain float32", "plain", "float32"),
    Case("plain float16", "plain", "float16"),
    Case("plain bfloat16", "plain", "bfloat16"),
    Case("compressed-tensors w4 g32", "compressed-tensors", "float32", w(4, 32)),
    Case("compressed-tensors w4 g32, float16", "compressed-tensors", "float16", w(4, 32)),
    Case("compressed-tensors w4 g32, bfloat16", "compressed-tensors", "bfloat16", w(4, 32)),
    Case("compressed-tensors w4 g64, float16", "compressed-tensors", "float16", w(4, 64)),
    Case("compressed-tensors w4 g32 asymmetric, float16", "compressed-tensors", "float16", w(4, 32, symmetric=False)),
    Case("gptq w4 g32", "gptq", "float16", w(4, 32)),
    Case("gptq w4 g64", "gptq", "float16", w(4, 64)),
    Case("gptq_v2 w4 g32", "gptq_v2", "float16", w(4, 32)),
    Case("gptq w4 g32, bfloat16", "gptq", "bfloat16", w(4, 32)),
    Case("awq w4 g32", "awq", "float16", w(4, 32)),
    Case("awq w4 g64 asymmetric", "awq", "float16", w(4, 64, symmetric=False)),
    Case("gptq_v2 w4 g32 asymmetric", "gptq_v2", "float16", w(4, 32, symmetric=False)),
    Case("gptq w8 g32", "gptq", "float16", w(8, 32)),
    Case("gptq w3 g32", "gptq", "float16", w(3, 32)),
    Case("gptq w4 g16", "gptq", "float16", w(4, 16)),
    Case("compressed-tensors w8 g32, float16", "compressed-tensors", "float16", w(8, 32)),
    Case("compressed-tensors w3 g32, float16", "compressed-tensors", "float16", w(3, 32)),
    *(
        Case(f"w8a8-int8 token, {dtype}", "compressed-tensors", dtype, w(8, "channel"), {})
        for dtype in ("float32", "float16", "bfloat16")
    ),
    Case("w8a8-int8 tensor, float32", "compressed-tensors", "float32", w(8, "channel"), {"scale": "tensor"}),
    Case(
        "w8a8-int8 tensor asymmetric, float32",
        "compressed-tensors",
        "float32",
        w(8, "channel"),
        {"scale": "tensor", "symmetric": False},
    ),
    *(
        Case(f"{name}, {dtype}", "compressed-tensors", dtype, grid, inputs)
        for name, grid, inputs in (
            ("w4a8 g32", w(4, 32), {}),
            ("w8a8-fp8 token", {"number": "fp8"}, {"number": "fp8"}),
            ("w8a8-fp8 tensor", {"number": "fp8"}, {"number": "fp8", "scale": "tensor"}),
        )
        for dtype in ("float32", "bfloat16")
    ),
    Case("fp8, bfloat16", "compressed-tensors", "bfloat16", {"number": "fp8"}),
    Case("nvfp4, bfloat16", "compressed-tensors", "bfloat16", {"number": "nvfp4"}),
    Case("mxfp4, bfloat16", "compressed-tensors", "bfloat16", {"number": "mxfp4"}),
    *(
        Case(f"w4 g32 kv fp8, {dtype}", "compressed-tensors", dtype, w(4, 32), cache="fp8")
        for dtype in ("float16", "bfloat16")
    ),
    Case("compressed-tensors w4 channel, float16", "compressed-tensors", "float16", w(4, "channel")),
    Case("plain w3 g32 + adapter", "plain", "float32", w(3, 32), adapter=LEARNT),
    Case("compressed-tensors w4 g32 + adapter, float16", "compressed-tensors", "float16", w(4, 32), adapter=LEARNT),
    Case("gptq w4 g32 + adapter", "gptq", "float16", w(4, 32), adapter=LEARNT),
    Case("compressed-tensors w3 g32 + adapter, float16", "compressed-tensors", "float16", w(3, 32), adapter=LEARNT),
    Case("plain w3 g32 + found adapter", "plain", "float32", w(3, 32), adapter=FOUND),
    Case("w4 g32 + found adapter, float16", "compressed-tensors", "float16", w(4, 32), adapter=FOUND),
]


def build(model: Path, case: Case, folder: Path, data: Path) -> None:
    """Quantize, and export twice: in the case's format, and plain for the reference. Both are verified on the way."""
    passes = [Step("cast", {"dtype": case.dtype})] if case.dtype != "float32" else []
    passes += [Step("rtn", case.grid)] if case.grid else []
    passes += [Step("quantize-activations", case.inputs)] if case.inputs is not None else []
    passes += [Step("quantize-kv", {"number": case.cache})] if case.cache is not None else []
    passes += [case.adapter] if case.adapter is not None else []
    calibrated = case.rounds or case.adapter is not None
    calibration = CalibrationSpec(data=str(data), samples=16, length=128) if calibrated else None
    for name, format_ in (("artifact", case.format), *(() if case.rounds else (("plain", "plain"),))):
        exports = (Step("safetensors", {"format": format_}),)
        recipe = Recipe(model=ModelSpec(id=str(model)), calibration=calibration, passes=tuple(passes), exports=exports)
        run_plan(make_plan(recipe), folder / name, force=True, reporter=Silent())


def prompts_of(model: Path, data: Path) -> list[list[int]]:
    """Cut evenly spread prompts from a text."""
    from transformers import AutoTokenizer

    text = data.read_text(encoding="utf-8")[:400_000]
    ids = AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = (len(ids) - PROMPT_TOKENS) // PROMPTS
    return [ids[index * step : index * step + PROMPT_TOKENS] for index in range(PROMPTS)]


@torch.inference_mode()
def logits_of(model: Any, rows: list[list[int]]) -> torch.Tensor:
    return model(torch.tensor(rows), use_cache=False).logits.float()


def greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Continue the prompts; every step computes the whole text anew."""
    rows = [list(prompt) for prompt in prompts]
    for _ in range(NEW_TOKENS):
        for row, token in zip(rows, logits_of(model, rows)[:, -1].argmax(-1).tolist(), strict=True):
            row.append(token)
    return [row[PROMPT_TOKENS:] for row in rows]


def share(own: list[list[int]], tokens: list[list[int]]) -> float:
    """Return the share of equal tokens."""
    return sum(a == b for x, y in zip(own, tokens, strict=True) for a, b in zip(x, y, strict=True)) / (
        PROMPTS * NEW_TOKENS
    )


def compare(model: Any, prompts: list[list[int]], answer: dict[str, Any]) -> dict[str, Any]:
    """Compare an engine's tokens with the reference's."""
    tokens = answer["tokens"]
    own = greedy(model, prompts)
    rows = [prompt + made for prompt, made in zip(prompts, tokens, strict=True)]
    logits = logits_of(model, rows)[:, PROMPT_TOKENS - 1 : -1]
    chosen = torch.tensor(tokens).unsqueeze(-1)
    behind = (logits.amax(-1) - logits.gather(-1, chosen).squeeze(-1)).flatten()
    firsts = [
        next((at for at, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), None)
        for a, b in zip(own, tokens, strict=True)
    ]
    gaps = behind.reshape(len(tokens), -1)
    surprise = logits.log_softmax(-1).gather(-1, chosen).squeeze(-1) - torch.tensor(answer["logprobs"])
    return {
        "same": share(own, tokens),
        "prompts_same": sum(first is None for first in firsts),
        "likeliest": float((behind == 0).float().mean()),
        "worst_gap": float(behind.max()),
        "logp": float(surprise.abs().median()),
        "first_gaps": [round(float(gaps[row, at]), 5) for row, at in enumerate(firsts) if at is not None],
    }


def engine(artifact: Path, prompts: list[list[int]], dtype: str, scratch: Path) -> dict[str, Any]:
    """Run vllm_generate.py in the engine's environment."""
    given, out, log = scratch / "prompts.json", scratch / "tokens.json", scratch / "vllm.log"
    given.write_text(json.dumps(prompts))
    out.unlink(missing_ok=True)
    script = Path(__file__).with_name("vllm_generate.py")
    command = [ENGINE, script, artifact, "--prompts", given, "--out", out, "--dtype", dtype]
    command += ["--adapter", artifact / "adapter"] if (artifact / "adapter").is_dir() else []
    with log.open("w") as stream:
        code = subprocess.run(list(map(str, command)), stdout=stream, stderr=stream, check=False, env=_env()).returncode
    if out.is_file():
        return json.loads(out.read_text())
    return {"error": f"the process ended with {code}: {log.read_text()[-300:]}"}


def _env() -> dict[str, str]:
    return {**os.environ, "PATH": f"{ENGINE.parent}{os.pathsep}{os.environ['PATH']}"}


def measure(model: Path, case: Case, prompts: list[list[int]], folder: Path) -> dict[str, Any]:
    """Generate from one artifact and compare."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    answer = engine(folder / "artifact", prompts, case.dtype, folder)
    row = {"model": model.name, "artifact": case.name, "dtype": case.dtype, "engine": answer.get("version")}
    if "error" in answer:
        return row | {"error": answer["error"]}
    if case.rounds:
        reference = load(folder / "artifact").model
    else:
        reference = AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.float32).eval()
        if case.adapter:
            row["without"] = compare(reference, prompts, answer)["same"]
            reference = PeftModel.from_pretrained(reference, folder / "plain" / "adapter").eval()
    row |= compare(reference, prompts, answer)
    if case.rounds:
        row["simulated"] = compare(simulate(folder / "artifact"), prompts, answer) | {
            "itself": steadiness(folder / "artifact", prompts, ERRORS[case.dtype])
        }
    return row


def steadiness(artifact: Path, prompts: list[list[int]], noise: float) -> float:
    """Return the share of tokens that the simulation keeps under a relative error, median of three."""
    still = greedy(simulate(artifact), prompts)
    return median(share(still, greedy(simulate(artifact, noise=noise, seed=seed), prompts)) for seed in range(3))


COLUMNS = (
    *("model", "artifact", "computed in", "same tokens", "same prompts"),
    *("reference's choice in context", "largest gap", "log p"),
    *("engine's arithmetic: same tokens", "in context", "log p", "itself"),
)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
    ]
    for row in rows:
        head = f"| {row['model']} | {row['artifact']} | {row['dtype']} |"
        if "error" in row:
            lines.append(f"{head} not run: {' '.join(row['error'].split())[:300].replace('|', '/')} |{' |' * 8}")
        else:
            lines.append(
                f"{head} {row['same']:.1%} | {row['prompts_same']} of {PROMPTS} | {row['likeliest']:.2%} | "
                f"{row['worst_gap']:.4f} | {row['logp']:.6f} | {_simulated(row.get('simulated'))} |"
            )
    return "\n".join(lines)


def _simulated(row: dict[str, Any] | None) -> str:
    if row is None:
        return " | | | "
    return f"{row['same']:.1%} | {row['likeliest']:.2%} | {row['logp']:.6f} | {row['itself']:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="the bundled model when none is named")
    parser.add_argument("--data", type=Path, help="text for the prompts (default: the bundled held-out text)")
    parser.add_argument("--only", nargs="*", help="artifacts by name")
    parser.add_argument("--json", type=Path, help="append a line for each artifact as it is measured")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    parser.add_argument("--scratch", type=Path, default=ROOT / ".build" / "engines" / "scratch")
    chosen = parser.parse_args()
    if not ENGINE.is_file():
        sys.exit("vLLM is not set up: run benchmarks/engines/vllm_cpu.sh")
    bundled = bundled_model()
    rows = []
    for model in chosen.models or [bundled]:
        data = chosen.data or bundled / "heldout.txt"
        prompts = prompts_of(model, data)
        cases = [case for case in CASES if not chosen.only or case.name in chosen.only]
        folders = [chosen.scratch / model.name / case.name.replace(" ", "-").replace(",", "") for case in cases]
        for case, folder in zip(cases, folders, strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            build(model, case, folder, data)
        for case, folder in zip(cases, folders, strict=True):
            rows.append(measure(model, case, prompts, folder))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            if chosen.json:
                with chosen.json.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(rows[-1]) + "\n")
    text = f"{describe()}\n\n{table(rows)}\n"
    print(text)
    if chosen.markdown:
        chosen.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
