"""Load an encoder in one engine, then embed texts on command; runs in the engine's environment without llmopt.

    python benchmarks/engines/encoder_worker.py ENGINE PATH --tokenizer FILE [--threads 1] [--parallel 1] [--length 256]

ENGINE is torch, onnxruntime, openvino, openvino-bf16, ctranslate2, ctranslate2-int8, or peak, which embeds nothing. The
worker keeps to the last THREADS of the cores that it may use, and divides them among as many batches at a time as
--parallel says, in the engine's own way where it has one. It prints a JSON line when it is ready, and one for each
line that it reads:

    {"batches": [[TEXT, ...], ...], "save": FILE}  ->  {"seconds": S}

The time is that of tokenizing, padding to the longest of the batch, the model, mean pooling where the model has none,
and normalising. `save` keeps the embeddings as a .npy file. `peak` multiplies large float32 matrices:  {"flops": N}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

EMBEDDING, HIDDEN = "sentence_embedding", "last_hidden_state"


def pin(threads: int) -> None:
    """Keep to `threads` cores, and tell every library that there are no more; before any of them is imported."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    os.environ.update(dict.fromkeys(names, str(threads)))
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # the others take their turns on the same cores


def pooled(hidden: Any, mask: Any) -> Any:
    """Return the mean over real tokens, and no division by a norm yet."""
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)


def normalised(rows: Any) -> Any:
    import numpy as np

    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def feeds(names: list[str], ids: Any, mask: Any) -> dict[str, Any]:
    import numpy as np

    given = {"input_ids": ids, "attention_mask": mask}
    return {name: given[name] if name in given else np.zeros_like(ids) for name in names}


def result(outputs: dict[str, Any], mask: Any) -> Any:
    return outputs[EMBEDDING] if EMBEDDING in outputs else pooled(next(iter(outputs.values())), mask)


def wanted(names: list[str]) -> str:
    """Return the output to ask for: the embedding, or the hidden states by whatever name comes first."""
    return next((name for name in (EMBEDDING, HIDDEN) if name in names), names[0])


def graph_in(folder: Path) -> str:
    """Return the graph of an artifact, which may be the file itself."""
    if folder.is_file():
        return str(folder)
    found = [folder / name for name in ("openvino_model.xml", "model.xml", "model.onnx") if (folder / name).exists()]
    return str((found or sorted(folder.glob("*.onnx")))[0])


def torch_(path: Path, threads: int, parallel: int) -> Callable[[Any, Any], Any]:
    import torch
    from transformers import AutoModel

    torch.set_num_threads(threads // parallel)
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()

    def run(ids: Any, mask: Any) -> Any:
        with torch.inference_mode():
            hidden = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
        return pooled(hidden.last_hidden_state.numpy(), mask)

    return run


def onnxruntime(path: Path, threads: int, parallel: int) -> Callable[[Any, Any], Any]:
    import onnxruntime as library

    options = library.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads // parallel, 1
    session = library.InferenceSession(graph_in(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    output = wanted([value.name for value in session.get_outputs()])
    return lambda ids, mask: result({output: session.run([output], feeds(names, ids, mask))[0]}, mask)


def openvino(path: Path, threads: int, parallel: int, precision: str) -> Callable[[Any, Any], Any]:
    import openvino as library

    settings = {
        "PERFORMANCE_HINT": "LATENCY" if parallel == 1 else "THROUGHPUT",
        "NUM_STREAMS": parallel,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,
    }
    core = library.Core()
    compiled = core.compile_model(core.read_model(graph_in(path)), "CPU", settings)
    requests = threading.local()
    names = [value.any_name for value in compiled.inputs]
    outputs = {name: value for value in compiled.outputs for name in value.get_names()}
    output = wanted(list(outputs) or [""])
    port = outputs[output]

    def run(ids: Any, mask: Any) -> Any:
        if not hasattr(requests, "own"):
            requests.own = compiled.create_infer_request()
        answer = requests.own.infer(feeds(names, ids, mask), share_inputs=True, share_outputs=True)
        return result({output: answer[port]}, mask)

    return run


def ctranslate2(path: Path, threads: int, parallel: int, kind: str) -> Callable[[Any, Any], Any]:
    import ctranslate2 as library
    import numpy as np

    share = {"inter_threads": parallel, "intra_threads": threads // parallel}
    encoder = library.Encoder(str(path), device="cpu", compute_type=kind, **share)

    def run(ids: list[list[int]], mask: Any) -> Any:
        return pooled(np.array(encoder.forward_batch(ids).last_hidden_state), mask)

    return run


def load(engine: str, path: Path, threads: int, parallel: int) -> Callable[[Any, Any], Any]:
    kind, _, precision = engine.partition("-")
    if kind == "torch":
        return torch_(path, threads, parallel)
    if kind == "onnxruntime":
        return onnxruntime(path, threads, parallel)
    if kind == "openvino":
        return openvino(path, threads, parallel, precision or "f32")
    return ctranslate2(path, threads, parallel, precision or "float32")


def peak(threads: int) -> float:
    """Return the operations per second of a large product of float32 matrices, the best of several."""
    import torch

    torch.set_num_threads(threads)
    matrix = torch.rand(1536, 1536)
    times: list[float] = []
    for _ in range(20):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - started)
    return 2 * 1536**3 / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine")
    parser.add_argument("path", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    pin(args.threads)
    # What libraries print goes to stderr: stdout speaks JSON alone.
    spoken = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=spoken, flush=True)

    if args.engine == "peak":
        say({"ready": True})
        for _ in sys.stdin:
            say({"flops": peak(args.threads)})
        return
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    tokenizer.enable_truncation(args.length)
    ragged = args.engine.startswith("ctranslate2")  # takes lists of unequal lengths
    tokenizer.enable_padding()
    run = load(args.engine, args.path, args.threads, args.parallel)

    def embed(texts: list[str]) -> Any:
        encoded = tokenizer.encode_batch(texts)
        mask = np.array([one.attention_mask for one in encoded], np.int64)
        if ragged:
            ids: Any = [one.ids[:count] for one, count in zip(encoded, mask.sum(1).tolist(), strict=True)]
        else:
            ids = np.array([one.ids for one in encoded], np.int64)
        return normalised(run(ids, mask))

    embed(["one", "two words"])
    say({"ready": True})
    with ThreadPoolExecutor(args.parallel) as pool:
        each = pool.map if args.parallel > 1 else map
        for line in sys.stdin:
            order = json.loads(line)
            started = time.perf_counter()
            rows = list(each(embed, order["batches"]))
            seconds = time.perf_counter() - started
            if order.get("save"):
                np.save(order["save"], np.concatenate(rows))
            say({"seconds": seconds})


if __name__ == "__main__":
    main()
