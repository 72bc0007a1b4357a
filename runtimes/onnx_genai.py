"""ONNX Runtime GenAI: opens a folder with genai_config.json and generates with its own cache."""

from __future__ import annotations

import json
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.errors import LlmoptError
from ..core.runtime import Arrays, Runtime, Session
from ..core.threads import take_turns
from ..core.untrusted import read_json
from ..graphs.limits import check_graph_file
from .onnxruntime_ import engine_errors
from .versions import installed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np

CONFIG = "genai_config.json"


class OnnxGenAI(Runtime):
    """The generator of ONNX Runtime GenAI."""

    name: ClassVar[str] = "onnx-genai"

    def version(self) -> str:
        """Return name and version."""
        return installed("onnxruntime-genai")

    def opens(self, directory: Path) -> bool:
        """Return whether there is a GenAI configuration."""
        return (directory / CONFIG).is_file()

    def open(
        self,
        directory: Path,
        *,
        threads: int | None = None,
        parallel: int = 1,  # noqa: ARG002
    ) -> GenAISession:
        """Load the folder.

        Raises:
            LlmoptError: it does not load.
        """
        for graph in sorted(directory.glob("*.onnx")):
            check_graph_file(graph)
        genai = _engine()
        genai.disable_telemetry_events()
        with engine_errors("the ONNX Runtime GenAI folder does not load", directory):
            config = genai.Config(str(directory))
            if threads is not None:
                options: dict[str, Any] = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
                if take_turns(threads):
                    options["session.intra_op.allow_spinning"] = "0"
                config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            model = genai.Model(config)
        described = read_json(directory / CONFIG)
        return GenAISession(model, directory, int(described["model"]["context_length"]))


class GenAISession(Session):
    """A folder, loaded."""

    def __init__(self, model: Any, directory: Path, context_length: int) -> None:
        self._model = model
        self._directory = directory
        self._context_length = context_length

    def outputs(self, inputs: Arrays) -> Arrays:
        """Return logits (batch, sequence, vocabulary) for every position; zeros where the mask is 0.

        Texts run one after another without their padding, and token by token, so that a graph that computes logits
        for the last position alone gives them all.

        Raises:
            LlmoptError: an input is missing, or the run fails.
        """
        import numpy as np

        if "input_ids" not in inputs:
            raise LlmoptError("the artifact needs input_ids", where=str(self._directory))
        ids = np.asarray(inputs["input_ids"])
        mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids))).astype(bool)
        rows: list[np.ndarray[Any, Any]] = []
        for row, kept in zip(ids, mask, strict=True):
            scored = self._score(row[kept].tolist())
            full = np.zeros((len(row), scored.shape[-1]), np.float32)
            full[kept] = scored
            rows.append(full)
        return {"logits": np.stack(rows)}

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Continue a prompt greedily.

        Raises:
            LlmoptError: prompt and new tokens together exceed the context length.
        """
        with engine_errors("the artifact does not generate", self._directory):
            generator = self._generator(len(prompt) + max_new_tokens)
            generator.append_tokens(_tokens(prompt))
            new: list[int] = []
            while True:
                # Not generate_next_token: it stops at an end-of-text token.
                new.append(int(_last_logits(generator).argmax()))
                if len(new) == max_new_tokens:
                    return new
                generator.append_tokens(_tokens(new[-1:]))

    def close(self) -> None:
        """Free the model."""
        self._model = None

    def _score(self, tokens: list[int]) -> np.ndarray[Any, Any]:
        import numpy as np

        with engine_errors("the artifact does not run", self._directory):
            generator = self._generator(len(tokens))
            scores: list[np.ndarray[Any, Any]] = []
            for token in tokens:
                generator.append_tokens(_tokens([token]))
                scores.append(_last_logits(generator).copy())
        return np.stack(scores)

    def _generator(self, length: int) -> Any:
        genai = _engine()
        if length > self._context_length:
            raise LlmoptError(
                f"{length} tokens do not fit the context of {self._context_length}", where=str(self._directory)
            )
        params = genai.GeneratorParams(self._model)
        # One more than needed: the generator takes no token once it has reached its maximum.
        params.set_search_options(max_length=min(length + 1, self._context_length), do_sample=False, batch_size=1)
        return genai.Generator(self._model, params)


def _engine() -> Any:
    # By name: the names in the package come from its compiled part, which type checkers do not see.
    return import_module("onnxruntime_genai")


def _tokens(tokens: Sequence[int]) -> np.ndarray[Any, Any]:
    import numpy as np

    return np.asarray(tokens, np.int32)


def _last_logits(generator: Any) -> np.ndarray[Any, Any]:
    """Return the logits after the last token, float32 (vocabulary,)."""
    import numpy as np

    logits = np.asarray(generator.get_logits(), np.float32)
    return logits.reshape(-1, logits.shape[-1])[-1]
