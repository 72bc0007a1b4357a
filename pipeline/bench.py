"""`llmopt bench`: load time, speed and memory, each artifact in a process of its own, measured in turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..core.ends import undone_by
from ..core.errors import LlmoptError, UsageError
from ..core.progress import Reporter
from ..core.runtime import Runtime
from ..models.locate import read_config
from .artifact import Artifact, open_artifact
from .batching import fixed
from .bench_worker import LATENCIES, generates
from .machine import processor
from .texts import Encoded, Encoder, longest_text, open_texts

_TEXTS, _BATCH = 64, 8
"""How many texts of a file are measured with, and how many at once."""

_RATIOS = {"load": "load_seconds", "size": "size_bytes", "peak_memory": "peak_memory_bytes"}
_SPEEDS = {
    "prefill_speed": "prefill_tokens_per_second",
    "decode_speed": "decode_tokens_per_second",
    "encode_speed": "sequences_per_second",
}


def bench(
    path: str,
    *,
    against: str | None,
    repeats: int,
    prompt_tokens: int,
    new_tokens: int,
    threads: int | None,
    reporter: Reporter,
    data: str | None = None,
    column: str | None = None,
) -> dict[str, Any]:
    """Measure one artifact, or two in turns.

    Every repeat measures each of them once, one straight after the other, so that what else the machine does hits
    both; the ratio is the median of the ratios of such pairs.

    Args:
        path: a model folder or an artifact.
        against: the one to compare with.
        repeats: measurements of each; one more, the first, is not counted.
        prompt_tokens: length of the prompt.
        new_tokens: tokens to generate after it.
        threads: threads to compute with, all cores when None.
        reporter: shown progress.
        data: a file of texts for an encoder, whose first ones are computed as they come; one length when None.
        column: the column that holds the text.

    Raises:
        UsageError: the texts cannot be used.
        LlmoptError: an artifact does not load or does not run.
    """
    artifacts = [open_artifact(one) for one in ([path] if against is None else [path, against])]
    for artifact in artifacts:
        artifact.runtime()  # refused before anything is started
    options: dict[str, Any] = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "threads": threads}
    if data is not None:
        options["input"] = data
    texts = [_texts(artifact, data, column) for artifact in artifacts]
    workers: list[Worker] = []
    with ExitStack() as started:
        with reporter.step("measuring", (repeats + 2) * len(artifacts)) as step:
            for artifact, own in zip(artifacts, texts, strict=True):
                workers.append(started.enter_context(working(artifact.directory, artifact.runtime(), options, own)))
                step.advance(detail=f"loaded {artifact.directory}")
            rounds: list[list[dict[str, Any]]] = []
            for index in range(repeats + 1):
                rounds.append([worker.measure() for worker in workers])
                step.advance(len(workers), detail=f"repeat {index} of {repeats}" if index else "warm-up")
        reports = [worker.report([one[at] for one in rounds[1:]]) for at, worker in enumerate(workers)]
    machine = {"processor": processor(), "cores": os.cpu_count() or 1}
    options["threads"] = threads or os.cpu_count() or 1
    made: dict[str, Any] = {"repeats": repeats, **options, "machine": machine, "measured": reports}
    if len(reports) == 2:
        made["ratio_of_first_to_second"] = _ratios(reports, rounds[1:])
    return made


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts as tokens, in batches; none for made-up ones."""

    batches: list[list[Encoded]]
    padding: int = 0


def _texts(artifact: Artifact, data: str | None, column: str | None) -> Texts:
    """Read the first texts of a file with the artifact's own tokenizer."""
    if data is None:
        return Texts([])
    from ..models.text import load_tokenizer

    config = read_config(artifact.directory)
    if generates(config):
        raise UsageError(
            "--input is for encoders",
            where=f"`{artifact.directory}` generates text",
            hint="set the length of the prompt with --prompt-tokens",
        )
    texts = open_texts(data, column, None)
    tokenizer = load_tokenizer(artifact.directory)
    encode = Encoder(tokenizer, longest_text(artifact.directory, config, None))
    read = (text for text in texts.read(tokenizer) if text[0].text.strip())
    rows = encode(list(islice(read, _TEXTS)))
    if not rows:
        raise UsageError(f"`{data}` holds no texts", hint="name a file with texts in it")
    padding = getattr(tokenizer, "pad_token_id", None)
    return Texts([[rows[at] for at in batch] for batch in fixed([len(row.ids) for row in rows], _BATCH)], padding or 0)


@contextmanager
def working(directory: Path, runtime: Runtime, options: dict[str, Any], texts: Texts) -> Generator[Worker]:
    """Have a process with a model loaded; it is ended however this ends."""
    worker = Worker(directory, runtime, options, texts.padding)
    with undone_by(worker.kill):
        try:
            worker.load(texts)
            yield worker
        finally:
            worker.close()


class Worker:
    """A model loaded in a process of its own, so that its memory and its load time are its own."""

    def __init__(self, directory: Path, runtime: Runtime, options: dict[str, Any], padding: int) -> None:
        self._directory = directory
        self._runtime = runtime.version()
        environment = dict(os.environ)
        if options["threads"] is not None:
            environment["OMP_NUM_THREADS"] = str(options["threads"])
        arguments = {"directory": str(directory), "runtime": runtime.name, "padding": padding, **options}
        self._process = subprocess.Popen(  # noqa: S603  (our own module)
            [sys.executable, "-m", "llmopt.pipeline.bench_worker", json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.load_seconds = 0.0

    def load(self, texts: Texts) -> None:
        """Wait until the model is loaded, and hand over the texts."""
        self.load_seconds = float(self._answer()["load_seconds"])
        if texts.batches:
            self._tell(json.dumps([[[text.ids, text.types] for text in batch] for batch in texts.batches]))

    def measure(self) -> dict[str, Any]:
        """Run one measurement."""
        return self._ask("measure")

    def report(self, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the medians; of an encoder's batches the latency that half of them, and 95 %, stay below."""
        directory = self._directory
        size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
        names = [name for name in rounds[0] if name != LATENCIES]
        medians = {name: statistics.median(one[name] for one in rounds) for name in names}
        if latencies := sorted(seconds for one in rounds for seconds in one.get(LATENCIES, ())):
            medians |= {f"p{share}_{LATENCIES}": latencies[(len(latencies) - 1) * share // 100] for share in (50, 95)}
        return {
            "path": str(directory),
            "runtime": self._runtime,
            "load_seconds": self.load_seconds,
            "size_bytes": size,
            **medians,
            "peak_memory_bytes": self.peak_memory_bytes(),
        }

    def kill(self) -> None:
        """End the process without waiting for it."""
        self._process.kill()

    def peak_memory_bytes(self) -> int:
        """Return the most memory that the process has had until now."""
        return int(self._ask("memory")["peak_memory_bytes"])

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.communicate()

    def _ask(self, what: str) -> dict[str, Any]:
        self._tell(what)
        return self._answer()

    def _tell(self, what: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                if "error" in answer:
                    raise LlmoptError(f"`{self._directory}` cannot be measured", where=str(answer["error"]))
                return answer
        raise LlmoptError(
            f"`{self._directory}` cannot be measured",
            where=f"the process ended with {self._process.wait()}",
            hint="was it killed for want of memory?",
        )


def _ratios(reports: list[dict[str, Any]], rounds: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Return first over second: for speeds the median of paired ratios, otherwise the ratio of the figures."""
    ratios = {name: reports[0][figure] / reports[1][figure] for name, figure in _RATIOS.items() if reports[1][figure]}
    for name, figure in _SPEEDS.items():
        if all(figure in one for one in rounds[0]):
            ratios[name] = statistics.median(pair[0][figure] / pair[1][figure] for pair in rounds)
    return ratios
