"""What a model can be measured at. A task reads its samples, and asks each model what it makes of them.

What it finds are columns: a value for each sample. A model's own columns have plain names, those of the source begin
with `source_`, and what the data say stands beside both; the metrics (`evaluation/metrics.py`) are made of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...calibration.fields import Fields, Role, Row
from ...core.errors import LlmoptError, UsageError
from ...core.progress import Step
from ...core.runtime import Session
from ..texts import Encoded, side_by_side
from .subjects import Subject

Found = dict[str, list[Any]]
"""Columns: what was found of each sample, in their order."""

LOGITS_PER_BATCH = 1 << 24
"""Logits of one batch, 64 MiB in float32."""

SOURCE = "source_"

MARGIN = 8
"""Tokens generated beyond the longest answer, to see that it ends there."""


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """How samples are made.

    Attributes:
        length: tokens of a window of running text; 512, or what the context has room for, when None.
        limit: samples to use, all when None.
        max_new_tokens: tokens to generate; as many as the longest answer needs when None.
    """

    length: int | None = None
    limit: int | None = None
    max_new_tokens: int | None = None


class Task:
    """A kind of measurement.

    Args:
        fields: the data.
        subject: the model that is measured.
        options: how samples are made.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    roles: ClassVar[tuple[Role, ...]]
    settings: ClassVar[frozenset[str]] = frozenset()
    """Which of `length` and `max_new_tokens` it heeds."""
    together: ClassVar[bool] = False
    """Whether what compares with the source needs both models at once."""

    def __init__(self, fields: Fields, subject: Subject, options: TaskOptions) -> None:
        self.fields = fields
        self.options = options
        self.prepare(subject)

    @classmethod
    def measures(cls, config: Mapping[str, Any], *, sentence: bool) -> bool:
        """Return whether a model can be measured at this.

        Args:
            config: its config.json.
            sentence: whether it gives embeddings of whole texts.
        """
        raise NotImplementedError

    @classmethod
    def files(cls, fields: Fields, limit: int | None) -> Iterator[Path]:  # noqa: ARG003
        """Yield the files that the data name, which are read beside them.

        Args:
            fields: the data.
            limit: samples that are used, all when None.

        Raises:
            LlmoptError: a row cannot be used.
        """
        return iter(())

    def prepare(self, subject: Subject) -> None:
        """Read the samples.

        Raises:
            LlmoptError: a row cannot be used.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        """Return the number of samples."""
        raise NotImplementedError

    def given(self) -> Found:
        """Return what the data say of the samples."""
        raise NotImplementedError

    def find(self, subject: Subject, session: Session, step: Step) -> Found:
        """Ask one model for every sample; the progress advances by one for each."""
        raise NotImplementedError

    def shown(self, index: int) -> dict[str, Any]:
        """Return what to write of a sample beside the columns: its texts."""
        raise NotImplementedError

    def rows(self) -> list[Row]:
        """Return the rows of the data.

        Raises:
            LlmoptError: there are none.
        """
        found = list(self.fields.rows(self.options.limit))
        if not found:
            raise LlmoptError(f"`{self.fields.source.spec}` holds no rows", hint="name a file with rows in it")
        return found


def is_causal(config: Mapping[str, Any]) -> bool:
    """Return whether config.json names a causal language model."""
    return str((config.get("architectures") or ["?"])[0]).endswith(("ForCausalLM", "LMHeadModel"))


def text_in(row: Row, role: str) -> str:
    """Return the text that a row holds.

    Raises:
        LlmoptError: it holds none.
    """
    value = row.values[role]
    if isinstance(value, str):
        return value
    raise LlmoptError(
        f"the {role} in {row.place} is no text",
        where=f"it holds {value!r:.80}",
        hint=f"name another column with --column {role}=NAME, or mend the row",
    )


def number_in(row: Row, role: str) -> float:
    """Return the number that a row holds.

    Raises:
        LlmoptError: it holds none.
    """
    value = row.values[role]
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise LlmoptError(
        f"the {role} in {row.place} is no number",
        where=f"it holds {value!r:.80}",
        hint=f"name another column with --column {role}=NAME, or mend the row",
    )


def padding_of(subject: Subject) -> int:
    """Return the token that batches are padded with."""
    padding = getattr(subject.tokenizer(), "pad_token_id", None)
    return int(padding if padding is not None else subject.config.get("pad_token_id") or 0)


def batch_inputs(batch: Sequence[Encoded], subject: Subject) -> Any:
    """Return a batch as a session takes it."""
    return side_by_side(batch, padding_of(subject))


def output(session: Session, inputs: Any, name: str, subject: Subject) -> Any:
    """Run a batch and return one output.

    Raises:
        LlmoptError: the artifact gives no such output.
    """
    made = session.outputs(inputs)
    if name not in made:
        raise LlmoptError(
            f"the artifact gives no `{name}`",
            where=f"{subject.directory} gives {', '.join(made)}",
            hint="export the model to ONNX: llmopt export MODEL -o DIR --export onnx",
        )
    return made[name]


def unknown_answer(row: Row, role: str, value: Any, known: Sequence[str]) -> UsageError:
    """Say that a row names an answer or a class that there is not."""
    return UsageError(
        f"the {role} in {row.place} is none that is known",
        where=f"it holds {value!r:.80}; known: {', '.join(known[:12])}",
        hint=f"name another column with --column {role}=NAME, or mend the row",
    )
