"""Speech to text with any runtime: the likeliest token after each other, the whole graph run again for each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.errors import LlmoptError
from ..core.runtime import Session
from ..models.speech import Ear, Speaking

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class Written(NamedTuple):
    """What a model has heard in a sound.

    Attributes:
        text: what is said.
        tokens: of that.
        seconds: how long the sound is.
    """

    text: str
    tokens: int
    seconds: float


class Scribe:
    """Writes down sounds as a model's folder says.

    Args:
        folder: the model's.
        config: its config.json.
        tokenizer: its tokenizer.

    Raises:
        LlmoptError: the folder does not say how.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], tokenizer: Any) -> None:
        self.ear, self.speaking = Ear(folder), Speaking.of(folder, config)
        self._tokenizer = tokenizer

    def write(self, session: Session, path: Path, max_new_tokens: int) -> Written:
        """Return what is said in a WAV file.

        Raises:
            LlmoptError: the model cannot hear it, or the artifact gives no logits of tokens.
        """
        sound = self.ear.listen(path)
        tokens = transcribe(session, self.ear.features(sound), self.speaking, max_new_tokens)
        text = str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        return Written(text, len(tokens), sound.seconds)


def transcribe(session: Session, features: Array, speaking: Speaking, max_new_tokens: int) -> list[int]:
    """Return the tokens of what a model hears, without those that it must begin and end with.

    Args:
        session: the model, opened.
        features: of one sound, (1, mel bands, frames).
        speaking: how it writes.
        max_new_tokens: tokens at most.

    Raises:
        LlmoptError: the artifact gives no logits of tokens.
    """
    begun = [speaking.start]
    if speaking.languages:
        logits = _logits(session, features, begun)
        begun.append(max(speaking.languages, key=lambda token: logits[token]))
    begun += speaking.then
    written: list[int] = []
    while len(written) < min(max_new_tokens, speaking.longest - len(begun)):
        logits = _logits(session, features, begun + written)
        never = speaking.never if written else speaking.never + speaking.never_first
        logits[list(never)] = -float("inf")
        token = int(logits.argmax())
        if token in speaking.ends:
            break
        written.append(token)
    return written


def _logits(session: Session, features: Array, tokens: list[int]) -> Array:
    """Return the logits of what comes behind `tokens`, (vocabulary,)."""
    import numpy as np

    made = session.outputs({"input_features": features, "decoder_input_ids": np.asarray([tokens], np.int64)})
    if "logits" not in made:
        raise LlmoptError("the artifact writes no text", where=f"it gives {', '.join(made)}")
    return np.array(made["logits"][0, -1])
