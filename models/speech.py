"""Speech to text: sound files, the features that a model hears, and the tokens that it begins with and never says."""

from __future__ import annotations

import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import LlmoptError, UsageError
from ..core.untrusted import UnreadableError, check_links, read_json

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_SETTINGS = "preprocessor_config.json"


def is_speech(config: Mapping[str, Any]) -> bool:
    """Return whether config.json names a model that writes down speech, of the kind known here: Whisper."""
    return config.get("model_type") == "whisper"


def read_sound(path: Path) -> tuple[Array, int]:
    """Return the samples of a WAV file of 16 bits, (samples,), float32 from -1 to 1, and how many a second has.

    Channels are averaged.

    Raises:
        LlmoptError: there is no such file, or it is another one.
    """
    import numpy as np

    try:
        with wave.open(str(path), "rb") as sound:
            rate, width, channels = sound.getframerate(), sound.getsampwidth(), sound.getnchannels()
            data = sound.readframes(sound.getnframes()) if width == 2 else b""
    except (OSError, EOFError, wave.Error) as error:
        raise _unheard(path, str(error) or "it ends too early") from None
    if width != 2:
        raise _unheard(path, f"it has {8 * width} bits a sample")
    if not data or len(data) % (2 * channels):
        raise _unheard(path, f"it holds {len(data)} bytes of sound in {channels} channels")
    return np.frombuffer(data, "<i2").reshape(-1, channels).mean(1, dtype=np.float32) / 32768, rate


def _unheard(path: Path, why: str) -> LlmoptError:
    return LlmoptError(
        f"`{path.name}` is no sound that can be read",
        where=f"{path}\n{why}",
        hint="give WAV files of 16 bits: ffmpeg -i SOUND -ar 16000 -ac 1 -c:a pcm_s16le SOUND.wav",
    )


class Ear:
    """Makes of sounds what a model hears.

    Args:
        folder: the model's, with preprocessor_config.json.

    Raises:
        UsageError: transformers makes no feature extractor of it.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoFeatureExtractor

        try:
            check_links(folder, _SETTINGS)
            self._extractor: Any = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
            self.rate = int(self._extractor.sampling_rate)
            self.longest = int(self._extractor.n_samples)
        except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise UsageError(
                f"no feature extractor can be made from `{folder}`",
                where=" ".join(str(error).split())[:300] or type(error).__name__,
                hint=f"put {_SETTINGS} beside the weights",
            ) from None

    def features(self, path: Path) -> Array:
        """Return a sound's features, (1, mel bands, frames), float32.

        Raises:
            LlmoptError: it cannot be read, has another sampling rate, or is longer than the model hears at once.
        """
        sound, rate = read_sound(path)
        if rate != self.rate:
            raise LlmoptError(
                f"`{path.name}` has {rate} samples a second, the model hears {self.rate}",
                where=str(path),
                hint=f"resample it: ffmpeg -i {path.name} -ar {self.rate} SOUND.wav",
            )
        if len(sound) > self.longest:
            raise LlmoptError(
                f"`{path.name}` is longer than the model hears at once",
                where=f"{path}\n{len(sound) / rate:.1f} s; it hears {self.longest / rate:.1f} s",
                hint="cut it into pieces",
            )
        return self._extractor(sound, sampling_rate=rate, return_tensors="np")["input_features"]


@dataclass(frozen=True, slots=True)
class Speaking:
    """How a model writes down what it hears, as generation_config.json says it (Radford et al. 2022, section 2.3).

    Attributes:
        start: the first token of the decoder.
        languages: tokens of which the likeliest comes next; none where the model knows one language.
        then: tokens behind that: to transcribe, without times.
        never: tokens that are not written.
        never_first: those with which no text begins.
        ends: tokens that end a text.
        longest: tokens that the decoder has room for.
    """

    start: int
    languages: tuple[int, ...]
    then: tuple[int, ...]
    never: tuple[int, ...]
    never_first: tuple[int, ...]
    ends: frozenset[int]
    longest: int

    @classmethod
    def of(cls, folder: Path, config: Mapping[str, Any]) -> Speaking:
        """Read it from a model's folder.

        Raises:
            LlmoptError: generation_config.json is damaged, or names no first token.
        """
        path = folder / "generation_config.json"
        try:
            said: dict[str, Any] = {**config, **(read_json(path) if path.is_file() else {})}
            languages = tuple(sorted(int(token) for token in (said.get("lang_to_id") or {}).values()))
            task = [said["task_to_id"]["transcribe"]] if said.get("task_to_id") else []
            silent = said.get("no_timestamps_token_id")
            ends: Any = said.get("eos_token_id")
            return cls(
                int(said["decoder_start_token_id"]),
                languages,
                (*map(int, task), *(() if silent is None else (int(silent),))),
                tuple(map(int, said.get("suppress_tokens") or ())),
                tuple(map(int, said.get("begin_suppress_tokens") or ())),
                frozenset(ends if isinstance(ends, list) else [ends]),
                int(said["max_target_positions"]),
            )
        except (UnreadableError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise LlmoptError(
                f"`{folder}` does not say how it writes down speech",
                where=f"config.json and {path.name}: {type(error).__name__} {error}",
                hint="fetch generation_config.json, which belongs to the model",
            ) from None
