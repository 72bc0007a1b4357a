"""The contract of a runtime: the engine in which an artifact will really run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import LlmoptError

if TYPE_CHECKING:
    import numpy as np

Arrays = Mapping[str, "np.ndarray[Any, Any]"]


class Session:
    """An artifact opened in its runtime."""

    def outputs(self, inputs: Arrays) -> Arrays:
        """Run one full forward pass without past.

        As many threads may call this at once as the session was opened for.

        Args:
            inputs: arrays by the model's input names (`input_ids`, `attention_mask`, `pixel_values`…), batch first.

        Returns:
            Arrays by output name; a language model gives `logits` (batch, sequence, vocabulary) for every position.
        """
        raise NotImplementedError

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Continue `prompt` greedily by exactly `max_new_tokens` tokens and return only those.

        Raises:
            LlmoptError: the artifact does not generate.
        """
        raise NotImplementedError

    def adapt(self, adapter: Path) -> None:
        """Load a folder of PEFT's beside the model: from now on it computes with the adapter.

        Raises:
            LlmoptError: it does not load, or the engine loads none.
        """
        raise LlmoptError(
            f"{type(self).__name__} loads no adapter", where=str(adapter), hint="move it out of the folder of its base"
        )

    def close(self) -> None:
        """Free what the session holds."""


class Runtime:
    """An engine."""

    name: ClassVar[str]
    parallel: ClassVar[bool] = False
    """Whether a session computes several batches at the same time."""

    def version(self) -> str:
        """Return name and version of the engine, such as `onnxruntime 1.31.1`; imports nothing heavy."""
        raise NotImplementedError

    def opens(self, directory: Path) -> bool:
        """Return whether `directory` holds an artifact for this engine; looks at file names only."""
        raise NotImplementedError

    def open(self, directory: Path, *, threads: int | None = None, parallel: int = 1) -> Session:
        """Load the artifact.

        Args:
            directory: the artifact.
            threads: number of threads to compute with, all cores when None.
            parallel: batches that will be computed at the same time, each on its share of the threads; 1 where the
                runtime is not `parallel`.

        Raises:
            LlmoptError: it does not load; the engine's own message is in `where`.
        """
        raise NotImplementedError
