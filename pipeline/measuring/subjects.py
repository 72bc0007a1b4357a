"""What is measured: an artifact or its source, each opened in its runtime with its own tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.errors import LlmoptError
from ...core.runtime import Runtime, Session
from ...models.locate import Location, read_config
from ...models.sentence import is_sentence_folder
from ...runtimes import RUNTIMES
from ..artifact import Artifact, opened_whole


@dataclass(slots=True)
class Subject:
    """A model that can be opened.

    Attributes:
        name: how it is called in messages.
        directory: where its config.json and tokenizer lie.
        runtime: the engine.
        root: the sentence-transformers folder, where that is another one.
        graph: the ONNX file, where it has a name of its own.
        threads: to compute with, all cores when None.
    """

    name: str
    directory: Path
    runtime: Runtime
    root: Path | None = None
    graph: Path | None = None
    threads: int | None = None
    _config: dict[str, Any] | None = None
    _tokenizer: Any = field(default=None, repr=False)

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        if self._config is None:
            self._config = read_config(self.directory)
        return self._config

    @property
    def architecture(self) -> str:
        """The class that config.json names."""
        return str((self.config.get("architectures") or ["?"])[0])

    @property
    def folder(self) -> Path:
        """The folder that tells what it does: the sentence-transformers folder, or its own."""
        return self.root or self.directory

    def tokenizer(self) -> Any:
        """Return its tokenizer, loaded once.

        Raises:
            UsageError: there is none.
        """
        if self._tokenizer is None:
            from ...models.text import load_tokenizer

            self._tokenizer = load_tokenizer(self.directory)
        return self._tokenizer

    def open(self) -> Session:
        """Load it, with the adapter that lies beside it; a sentence-transformers folder in transformers pools.

        Raises:
            LlmoptError: it does not load.
        """
        if self.graph is not None:
            from ...runtimes.onnxruntime_ import OnnxRuntime

            return OnnxRuntime().open_graph(self.graph, threads=self.threads)
        session = opened_whole(self.runtime, self.directory, threads=self.threads)
        model = getattr(session, "model", None)
        if model is not None and is_sentence_folder(self.folder):
            from ...models.pooling import pool_sentences
            from ...models.sentence import read_sentence

            pool_sentences(model, read_sentence(self.folder))
        return session


def subject_of(artifact: Artifact, *, name: str, threads: int | None = None) -> Subject:
    """Return an artifact, or any folder that a runtime opens, as what is measured.

    Raises:
        UsageError: no runtime opens it.
    """
    return Subject(name, artifact.directory, artifact.runtime(), threads=threads)


def source_subject(location: Location, *, threads: int | None = None) -> Subject:
    """Return a model as it was before anything was done to it.

    Raises:
        LlmoptError: no engine here opens it.
    """
    root = None if location.sentence is None else location.sentence.root
    name = "onnxruntime" if location.graph is not None else "transformers"
    runtime = RUNTIMES.load(name)()
    if location.graph is None and not runtime.opens(location.folder):
        raise LlmoptError(
            f"the source `{location.source}` cannot be measured",
            where=f"{location.folder} holds no safetensors that transformers opens",
            hint="leave out what compares with the source",
        )
    return Subject("source", location.folder, runtime, root=root, graph=location.graph, threads=threads)
