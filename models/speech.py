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
_MAKE = "give WAV files of 16 bits: ffmpeg -i SOUND -ar 16000 -ac 1 -c:a pcm_s16le SOUND.wav"
_UNKNOWN = 0x7FFF0000
"""As many bytes of sound, or more, stand in the header of a file whose writer did not know its length: a pipe."""


def is_speech(config: Mapping[str, Any]) -> bool:
    """Return whether config.json names a model that writes down speech, of the kind known here: Whisper."""
    return config.get("model_type") == "whisper"


@dataclass(frozen=True, slots=True)
class Sound:
    """What a WAV file holds.

    Attributes:
        samples: from -1 to 1, (samples,), float32; channels are averaged.
        rate: samples a second.
        length: samples of the whole file, of which `samples` may be the beginning; as many as were read where its
            header does not tell.
    """

    samples: Array
    rate: int
    length: int

    @property
    def seconds(self) -> float:
        """How long the whole file is."""
        return self.length / self.rate


def read_sound(path: Path, most: int | None = None) -> Sound:
    """Return what a WAV file of 16 bits holds.

    Args:
        path: the file.
        most: samples that are read, all when None.

    Raises:
        LlmoptError: there is no such file, or it is another one.
    """
    import numpy as np

    try:
        with wave.open(str(path), "rb") as sound:
            rate, width, channels = sound.getframerate(), sound.getsampwidth(), sound.getnchannels()
            frame, told = width * channels, sound.getnframes()
            wanted = told if most is None else min(told, most)
            # What a header tells may be gigabytes more than there is.
            data = sound.readframes(min(wanted, path.stat().st_size // frame)) if width == 2 else b""
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise _unheard(path, why, hint="name it by its path from the folder of the data") from None
    except (EOFError, wave.Error) as error:
        raise _unheard(path, str(error) or "it ends too early") from None
    if width != 2:
        raise _unheard(path, f"it has {8 * width} bits a sample")
    if not data or len(data) % frame or not rate:
        raise _unheard(path, f"it holds {len(data)} bytes of sound in {channels} channels, {rate} samples a second")
    whole, read = told * frame < _UNKNOWN, len(data) // frame
    if whole and read < wanted:
        raise _unheard(path, f"it ends too early: {read} of {told} samples are there")
    samples = np.frombuffer(data, "<i2").reshape(-1, channels).mean(1, dtype=np.float32) / 32768
    return Sound(samples, rate, told if whole else read)


def _unheard(path: Path, why: str, *, hint: str = _MAKE) -> LlmoptError:
    return LlmoptError(f"`{path.name}` is no sound that can be read", where=f"{path}\n{why}", hint=hint)


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

    def listen(self, path: Path) -> Sound:
        """Return a sound that the model can hear; of one that is too long no more is read than shows that it is.

        Raises:
            LlmoptError: it cannot be read, has another sampling rate, or is longer than the model hears at once.
        """
        sound = read_sound(path, self.longest + 1)
        if sound.rate != self.rate:
            raise LlmoptError(
                f"`{path.name}` has {sound.rate} samples a second, the model hears {self.rate}",
                where=str(path),
                hint=f"resample it: ffmpeg -i {path.name} -ar {self.rate} SOUND.wav",
            )
        if sound.length > self.longest:
            raise LlmoptError(
                f"`{path.name}` is longer than the model hears at once",
                where=f"{path}\n{sound.seconds:.1f} s; it hears {self.longest / self.rate:.1f} s",
                hint="cut it into pieces",
            )
        return sound

    def features(self, sound: Sound) -> Array:
        """Return what the model hears of a sound, (1, mel bands, frames), float32."""
        return self._extractor(sound.samples, sampling_rate=sound.rate, return_tensors="np")["input_features"]


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
