"""What an artifact is asked for, by its architecture, and how its outputs become a row of the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ..core.errors import LlmoptError, UsageError
from ..core.runtime import Arrays, Session
from ..core.untrusted import read_json
from ..models.sentence import is_sentence_folder
from .texts import Encoded, side_by_side

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

Row = dict[str, Any]
_DIGITS = 7
"""Decimals written: as many as float32 holds below 1."""


class Job:
    """What is computed of a batch of texts.

    Args:
        directory: the artifact.
        config: its config.json.
        tokenizer: its tokenizer.
    """

    title: ClassVar[str]
    nothing: ClassVar[Row]
    """The row of a text that has no tokens."""
    places: ClassVar[bool] = False
    """Whether it must know where in the text each token stands."""
    alone: ClassVar[bool] = False
    """Whether each text is computed alone."""

    def __init__(self, directory: Path, config: dict[str, Any], tokenizer: Any) -> None:
        self.directory = directory
        self.config = config
        self.tokenizer = tokenizer
        padding = getattr(tokenizer, "pad_token_id", None)
        self._padding = int(padding if padding is not None else config.get("pad_token_id") or 0)

    def run(self, session: Session, batch: Sequence[Encoded]) -> list[Row]:
        """Compute one batch.

        Raises:
            LlmoptError: the artifact does not run, or gives other outputs than the job needs.
        """
        return self.rows(session.outputs(side_by_side(batch, self._padding)), batch)

    def rows(self, outputs: Arrays, batch: Sequence[Encoded]) -> list[Row]:
        """Return a row for each text of a batch."""
        raise NotImplementedError

    def _output(self, outputs: Arrays, name: str) -> Array:
        if name not in outputs:
            raise LlmoptError(
                f"the artifact gives no `{name}`",
                where=f"{self.directory} gives {', '.join(outputs)}",
                hint="export the model to ONNX: llmopt export MODEL -o DIR --export onnx",
            )
        return outputs[name]

    def _labels(self, count: int) -> list[str]:
        named: dict[str, Any] = {str(key): value for key, value in dict(self.config.get("id2label") or {}).items()}
        return [str(named.get(str(index), f"LABEL_{index}")) for index in range(count)]


class Embedding(Job):
    """One vector for each text."""

    title = "embeddings"
    nothing: ClassVar[Row] = {"embedding": None}

    def rows(self, outputs: Arrays, batch: Sequence[Encoded]) -> list[Row]:  # noqa: ARG002
        """Return the pooled output."""
        return [{"embedding": _plain(row)} for row in self._output(outputs, "sentence_embedding")]


class Classes(Job):
    """A score for each label of a text: of all labels together 1, or of each label alone where they are independent."""

    title = "class scores"
    nothing: ClassVar[Row] = {"label": None, "score": None, "scores": {}}

    def rows(self, outputs: Arrays, batch: Sequence[Encoded]) -> list[Row]:  # noqa: ARG002
        """Return the label with the largest score, its score, and all scores."""
        logits = self._output(outputs, "logits")
        kind = self.config.get("problem_type")
        if kind == "regression":
            scores = logits
        elif kind == "multi_label_classification" or logits.shape[-1] == 1:
            scores = _sigmoid(logits)
        else:
            scores = _softmax(logits)
        labels = self._labels(logits.shape[-1])
        rows: list[Row] = []
        for row in scores:
            best, values = int(row.argmax()), _plain(row)
            rows.append(
                {"label": labels[best], "score": values[best], "scores": dict(zip(labels, values, strict=True))}
            )
        return rows


class TokenClasses(Job):
    """A label for each token, with its place in the text."""

    title = "token classes"
    nothing: ClassVar[Row] = {"tokens": []}
    places = True

    def rows(self, outputs: Arrays, batch: Sequence[Encoded]) -> list[Row]:
        """Return the tokens that stand for text, each with its label."""
        logits = self._output(outputs, "logits")
        labels = self._labels(logits.shape[-1])
        rows: list[Row] = []
        for text, states in zip(batch, logits, strict=True):
            scores = _softmax(states[: len(text.ids)])
            best = scores.argmax(-1)
            values = _plain(scores[range(len(best)), best])
            names = self.tokenizer.convert_ids_to_tokens(text.ids)
            offsets = text.offsets or [(None, None)] * len(names)
            special = text.special or [0] * len(names)
            rows.append(
                {
                    "tokens": [
                        {"token": name, "start": start, "end": end, "label": labels[label], "score": value}
                        for name, (start, end), hidden, label, value in zip(
                            names, offsets, special, best.tolist(), values, strict=True
                        )
                        if not hidden
                    ]
                }
            )
        return rows


class Generation(Job):
    """The likeliest continuation of each text, up to the token that ends a text."""

    title = "text"
    nothing: ClassVar[Row] = {"text": ""}
    alone = True
    new_tokens = 32

    def run(self, session: Session, batch: Sequence[Encoded]) -> list[Row]:
        """Continue each text; a runtime generates for one text at a time."""
        return [self._continued(session, text) for text in batch]

    def text(self, made: Sequence[int]) -> tuple[str, bool]:
        """Return generated tokens as text, and whether a token that ends a text is among them."""
        ends = self._ends()
        stop = next((at for at, token in enumerate(made) if token in ends), len(made))
        return self.tokenizer.decode(made[:stop], skip_special_tokens=True), stop < len(made)

    def _continued(self, session: Session, text: Encoded) -> Row:
        return {"text": self.text(session.generate(text.ids, self.new_tokens))[0]}

    def _ends(self) -> set[Any]:
        ends: Any = self.config.get("eos_token_id")
        path = self.directory / "generation_config.json"
        if path.is_file():
            ends = read_json(path).get("eos_token_id", ends)
        return set(cast("list[int]", ends)) if isinstance(ends, list) else {ends}


_BY_ENDING: dict[str, type[Job]] = {
    "ForSequenceClassification": Classes,
    "ForTokenClassification": TokenClasses,
    "ForCausalLM": Generation,
    "LMHeadModel": Generation,
    "ForConditionalGeneration": Generation,
}


def job_of(directory: Path, config: dict[str, Any]) -> type[Job]:
    """Return what an artifact can be asked for.

    Raises:
        UsageError: nothing that is known here.
    """
    if is_sentence_folder(directory):
        return Embedding
    architecture = str((config.get("architectures") or ["?"])[0])
    found = next((job for ending, job in _BY_ENDING.items() if architecture.endswith(ending)), None)
    if found is None:
        raise UsageError(
            f"`{directory}` gives no results that can be written as rows",
            where=f"config.json names {architecture}, and there is no modules.json that says how embeddings are made",
            hint="give an artifact of a sentence-transformers folder, a classifier, or a model that generates text",
        )
    return found


def _plain(values: Array) -> list[float]:
    """Return float32 values as numbers that are short in JSON."""
    import numpy as np

    return np.round(values.astype(np.float64), _DIGITS).tolist()


def _softmax(logits: Array) -> Array:
    import numpy as np

    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def _sigmoid(logits: Array) -> Array:
    import numpy as np

    return 1 / (1 + np.exp(-logits))
