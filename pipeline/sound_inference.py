"""`llmopt infer` of a model that writes down speech: the text of each sound that the rows of a file name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ..calibration.fields import open_fields
from ..calibration.source import open_source
from ..core.errors import UsageError
from ..core.progress import Step
from ..core.runtime import Session
from .inference import ALONE, Inference, InferOptions, line, tokenizer_of
from .journal import Totals
from .sounds import AUDIO, folder_of, sound_in
from .transcribing import Scribe, Written


class SoundInference(Inference):
    """Writes down sounds, each alone.

    Args:
        directory: the artifact.
        config: its config.json.
        data: a file whose rows name WAV files.
        options: how.

    Raises:
        UsageError: the file names no sounds, an option is not for them, or the artifact lacks what it hears with.
    """

    rows: ClassVar[str] = "sounds"
    title = "text of sounds"
    window = ALONE

    def __init__(self, directory: Path, config: dict[str, Any], data: str, options: InferOptions) -> None:
        super().__init__()
        _check_options(directory, options)
        _check_data(directory, data)
        self.source = open_source(data)
        self._folder = folder_of(self.source)
        column = options.column
        self._fields = open_fields(data, (AUDIO,), {} if column is None else {AUDIO.name: column})
        self._scribe = Scribe(directory, config, tokenizer_of(directory))
        self._new_tokens = options.max_new_tokens or self._scribe.speaking.longest

    def count(self) -> int:
        """Listen to every sound once."""
        count = 0
        for path in self.read():
            self._scribe.ear.listen(path)
            count += 1
        return count

    def files(self) -> Iterator[Path]:
        """Yield the list of the sounds, then the sounds."""
        yield from super().files()
        yield from self.read()

    def read(self) -> Iterator[Path]:
        """Yield where the sounds lie."""
        return (sound_in(row, self._folder) for row in self._fields.rows())

    def compute(
        self, session: Session, window: Sequence[Path], totals: Totals, step: Step
    ) -> tuple[list[bytes], Totals]:
        """Write down every sound of a window."""
        lines: list[bytes] = []
        added = Totals(rows=totals.rows, tokens=totals.tokens, sound_seconds=totals.sound_seconds)

        def write(path: Path) -> Written:
            return self._timed(partial(self._scribe.write, session, path, self._new_tokens))

        for written in self.each(write, window):
            lines.append(line(added.rows, {"text": written.text}))
            added.rows += 1
            added.tokens += written.tokens
            added.sound_seconds += written.seconds
            step.advance()
        return lines, added

    def report(self, totals: Totals, before: Totals, seconds: float) -> dict[str, Any]:
        """Return how long the sounds are, what was written, and how fast."""
        middle, high = self._percentiles()
        return {
            "sound_seconds": totals.sound_seconds,
            "tokens": totals.tokens,
            "seconds": seconds,
            "tokens_per_second": (totals.tokens - before.tokens) / seconds,
            "real_time_ratio": (totals.sound_seconds - before.sound_seconds) / seconds,
            "p50_seconds": middle,
            "p95_seconds": high,
        }


def _check_options(directory: Path, options: InferOptions) -> None:
    if any(one is not None for one in (options.pair_column, options.batching, options.max_length)):
        raise UsageError(
            f"`{directory}` hears one sound at a time",
            where="--pair-column, --max-length, --batching, --batch-size and --max-batch-tokens are for texts",
            hint="leave them out",
        )


def _check_data(directory: Path, data: str) -> None:
    """Refuse a file that can be no list of sounds."""
    suffix = Path(data).suffix.lower()
    if suffix in {".txt", ".wav"} and Path(data).is_file():
        raise UsageError(
            f"`{data}` is {'a text' if suffix == '.txt' else 'a sound'}, no list of sounds",
            where=f"`{directory}` hears sounds that the rows of a file name",
            hint='name a .jsonl, .csv or .parquet file with a row for each sound: {"audio": "a.wav"}',
        )
