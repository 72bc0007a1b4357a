"""The process that `llmopt bench` measures: loads one artifact, then answers a line for every line it is asked."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from ..core.errors import LlmoptError
from ..core.runtime import Session
from ..models.locate import read_config
from ..runtimes import RUNTIMES

_BATCH = 8


def main() -> None:
    """Serve measurements until the input ends."""
    options = json.loads(sys.argv[1])
    directory = Path(options["directory"])
    try:
        runtime = RUNTIMES.load(options["runtime"])()
        started = time.perf_counter()
        session = runtime.open(directory, threads=options["threads"])
        _say({"load_seconds": time.perf_counter() - started})
        config = read_config(directory)
        for line in sys.stdin:
            _say(_memory() if line.strip() == "memory" else _measure(session, config, options))
    except LlmoptError as error:
        _say({"error": str(error)})


def _measure(session: Session, config: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    vocabulary = int(config.get("vocab_size", 256))
    prompt = [2 + (7 * index) % (vocabulary - 2) for index in range(options["prompt_tokens"])]
    architecture = str((config.get("architectures") or [""])[0])
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return _generate(session, prompt, options["new_tokens"])
    return _encode(session, config, prompt)


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


def _encode(session: Session, config: dict[str, Any], prompt: list[int]) -> dict[str, float]:
    import numpy as np

    if "vocab_size" not in config or config.get("model_type") == "whisper":
        raise LlmoptError("bench measures models that take text", where=f"model_type {config.get('model_type')}")
    row = prompt[: int(config.get("max_position_embeddings", len(prompt) + 2)) - 2]
    inputs = {"input_ids": np.array([row] * _BATCH, dtype=np.int64)}
    if config.get("is_encoder_decoder"):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    started = time.perf_counter()
    session.outputs(inputs)
    return {"sequences_per_second": _BATCH / (time.perf_counter() - started)}


def _memory() -> dict[str, float]:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
