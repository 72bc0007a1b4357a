"""The process that `llmopt bench` measures: loads one artifact, then answers a line for every line it is asked.

A line that is a JSON list holds the texts to measure with, as tokens: batches of [ids, types]. It has no answer.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from ..core.errors import LlmoptError
from ..core.runtime import Session
from ..models.locate import read_config
from ..models.speech import is_speech
from ..runtimes import RUNTIMES
from .artifact import opened_whole
from .texts import Encoded, side_by_side

_BATCH = 8
LATENCIES = "batch_seconds"
"""In an answer: the seconds of each batch."""


def generates(config: dict[str, Any]) -> bool:
    """Return whether a model is measured by what it generates."""
    return str((config.get("architectures") or [""])[0]).endswith(("ForCausalLM", "LMHeadModel"))


def main() -> None:
    """Serve measurements until the input ends."""
    options = json.loads(sys.argv[1])
    directory = Path(options["directory"])
    try:
        runtime = RUNTIMES.load(options["runtime"])()
        started = time.perf_counter()
        session = opened_whole(runtime, directory, threads=options["threads"])
        _say({"load_seconds": time.perf_counter() - started})
        config = read_config(directory)
        batches: list[list[Encoded]] = []
        for line in sys.stdin:
            if line.startswith("["):
                batches = [[Encoded(*row) for row in batch] for batch in json.loads(line)]
            else:
                _say(_memory() if line.strip() == "memory" else _measure(session, config, batches, options))
    except LlmoptError as error:
        _say({"error": str(error)})


def _measure(
    session: Session, config: dict[str, Any], batches: list[list[Encoded]], options: dict[str, Any]
) -> dict[str, Any]:
    vocabulary = int(config.get("vocab_size", 256))
    prompt = [2 + (7 * index) % (vocabulary - 2) for index in range(options["prompt_tokens"])]
    if generates(config):
        return _generate(session, prompt, options["new_tokens"])
    return _encode(session, config, batches or _made_up(config, prompt), options["padding"])


def _generate(session: Session, prompt: list[int], new_tokens: int) -> dict[str, float]:
    started = time.perf_counter()
    session.generate(prompt, 1)
    first = time.perf_counter() - started
    started = time.perf_counter()
    session.generate(prompt, new_tokens + 1)
    rest = time.perf_counter() - started - first
    return {
        "prefill_tokens_per_second": len(prompt) / first,
        "decode_tokens_per_second": new_tokens / max(rest, 1e-9),
    }


def _made_up(config: dict[str, Any], prompt: list[int]) -> list[list[Encoded]]:
    """Return one batch of made-up texts of one length."""
    if "vocab_size" not in config or is_speech(config):
        raise LlmoptError("bench measures models that take text", where=f"model_type {config.get('model_type')}")
    row = prompt[: int(config.get("max_position_embeddings", len(prompt) + 2)) - 2]
    return [[Encoded(row)] * _BATCH]


def _encode(
    session: Session, config: dict[str, Any], batches: list[list[Encoded]], padding: int
) -> dict[str, float | list[float]]:
    """Compute every batch once; padding is computed too, but counts for nothing in the speeds."""
    latencies: list[float] = []
    for batch in batches:
        inputs = dict(side_by_side(batch, padding))
        if config.get("is_encoder_decoder"):
            inputs["decoder_input_ids"] = inputs["input_ids"]
        started = time.perf_counter()
        session.outputs(inputs)
        latencies.append(time.perf_counter() - started)
    texts = sum(map(len, batches))
    tokens = sum(len(text.ids) for batch in batches for text in batch)
    padded = sum(len(batch) * max(len(text.ids) for text in batch) for batch in batches)
    return {
        "texts": texts,
        "tokens": tokens,
        "padded_tokens": padded,
        "fill_ratio": tokens / padded,
        "sequences_per_second": texts / sum(latencies),
        "tokens_per_second": tokens / sum(latencies),
        LATENCIES: latencies,
    }


def _memory() -> dict[str, float]:
    # On Linux the largest resident size that `getrusage` tells of a new process begins at its parent's.
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        peak = next((line.split() for line in lines if line.startswith("VmHWM:")), None)
        if peak is not None:
            return {"peak_memory_bytes": float(peak[1]) * 1024}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
