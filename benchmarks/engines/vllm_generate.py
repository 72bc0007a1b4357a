"""Generate greedily in vLLM; runs in vLLM's own environment (see vllm_cpu.sh) and knows nothing of llmopt.

    .build/engines/vllm/bin/python benchmarks/engines/vllm_generate.py ARTIFACT --prompts FILE --out FILE

`--adapter DIR` loads a LoRA beside the artifact.

PROMPTS is a JSON list of lists of token ids. OUT becomes {"version", "dtype", "tokens", "logprobs"}, the last being
log p of each token, or {"version", "error"}, where the error is vLLM's own message.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: errors arrive here
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}

RANKS = (16, 32, 64, 128, 256, 320, 512)


def generate(
    artifact: str, prompts: list[list[int]], dtype: str, new_tokens: int, adapter: str | None
) -> dict[str, Any]:
    """Continue each prompt by exactly `new_tokens` tokens, the likeliest at every step; return them with log p."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        model=artifact,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=max(map(len, prompts)) + new_tokens,
        max_num_seqs=len(prompts),
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        enable_lora=adapter is not None,
        max_lora_rank=_largest_rank(adapter),
        seed=0,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, logprobs=1)
    beside = None if adapter is None else LoRARequest("adapter", 1, adapter)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    made = engine.generate(asked, sampling, use_tqdm=False, lora_request=beside)
    best = [one.outputs[0] for one in made]
    tokens = [list(one.token_ids) for one in best]
    logprobs = [[at[token].logprob for at, token in zip(one.logprobs, one.token_ids, strict=True)] for one in best]
    return {"tokens": tokens, "logprobs": logprobs}


def _largest_rank(adapter: str | None) -> int:
    """Return the smallest of the ranks that vLLM can be asked for that the adapter does not exceed."""
    if adapter is None:
        return RANKS[0]
    rank = json.loads((Path(adapter) / "adapter_config.json").read_text())["r"]
    return next(one for one in RANKS if one >= rank)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--adapter", help="a LoRA folder")
    chosen = parser.parse_args()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from importlib.metadata import version

    answer: dict[str, object] = {"version": f"vllm-cpu {version('vllm-cpu')}", "dtype": chosen.dtype}
    try:
        prompts = json.loads(chosen.prompts.read_text())
        answer |= generate(chosen.artifact, prompts, chosen.dtype, chosen.new_tokens, chosen.adapter)
    except Exception as error:  # noqa: BLE001  whatever the engine raises is the result
        answer["error"] = f"{type(error).__name__}: {error}"
    chosen.out.write_text(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
