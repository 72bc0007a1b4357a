"""The task of speech models: writing down what is said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...calibration.fields import Fields, Role, Row
from ...core.errors import LlmoptError
from ...core.progress import Step
from ...core.runtime import Session
from ...evaluation.figures import word_errors
from ...models.speech import is_speech
from ..sounds import AUDIO, folder_of, sound_in
from ..transcribing import Scribe
from .subjects import Subject
from .tasks import MARGIN, Found, Task, text_in


class Transcribe(Task):
    """How many words a model gets wrong of what is said in WAV files; their paths are those from the data's folder."""

    name = "transcribe"
    settings = frozenset({"max_new_tokens"})
    title = "speech to text"
    roles = (
        AUDIO,
        Role("text", ("text", "sentence", "transcript", "transcription", "reference", "normalized_text")),
    )

    @classmethod
    def measures(cls, config: Mapping[str, Any], *, sentence: bool) -> bool:  # noqa: ARG003
        """Return whether it writes down speech."""
        return is_speech(config)

    @classmethod
    def files(cls, fields: Fields, limit: int | None) -> Iterator[Path]:
        """Yield the sounds."""
        folder = folder_of(fields.source)
        return (sound_in(row, folder) for row in fields.rows(limit))

    def prepare(self, subject: Subject) -> None:
        """Read paths and texts, and hear every sound once, so that one that cannot be used is met before the work."""
        folder = folder_of(self.fields.source)
        rows = self.rows()
        self.sounds = [sound_in(row, folder) for row in rows]
        self.texts = [_words(row) for row in rows]
        ear = _scribe(subject).ear
        for sound in self.sounds:
            ear.listen(sound)
        lengths = [len(subject.tokenizer()(text)["input_ids"]) for text in self.texts]
        self.new_tokens = self.options.max_new_tokens or 2 * max(lengths) + MARGIN

    def __len__(self) -> int:
        """Return the number of sounds."""
        return len(self.sounds)

    def given(self) -> Found:
        """Return what is said."""
        return {"expected": list(self.texts)}

    def find(self, subject: Subject, session: Session, step: Step) -> Found:
        """Write down every sound."""
        scribe = _scribe(subject)
        found: Found = {"generated": [], "word_edits": [], "words": []}
        for sound, text in zip(self.sounds, self.texts, strict=True):
            written = scribe.write(session, sound, self.new_tokens).text
            found["generated"].append(written)
            edits, words = word_errors([text], written)
            found["word_edits"].append(edits)
            found["words"].append(words)
            step.advance()
        return found

    def shown(self, index: int) -> dict[str, Any]:
        """Return the sound's path."""
        return {"audio": str(self.sounds[index])}


def _scribe(subject: Subject) -> Scribe:
    return Scribe(subject.directory, subject.config, subject.tokenizer())


def _words(row: Row) -> str:
    text = text_in(row, "text")
    if text.split():
        return text
    raise LlmoptError(
        f"the text in {row.place} has no words", hint="a word error rate needs words to compare with: take the row out"
    )
