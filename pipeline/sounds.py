"""Sounds that data name: a WAV file for each row, its path from the folder of the data."""

from __future__ import annotations

from pathlib import Path

from ..calibration.fields import Role, Row
from ..calibration.source import Source
from ..core.errors import LlmoptError, UsageError

AUDIO = Role("audio", ("audio", "path", "file", "wav", "sound", "file_name", "filename"))


def folder_of(source: Source) -> Path:
    """Return the folder from which the sounds of data are named.

    Raises:
        UsageError: there is none.
    """
    if source.path is None:
        raise UsageError(
            f"sounds of `{source.spec}` cannot be read",
            where="they lie in a data set of the hub",
            hint="save them as WAV files, and name a JSONL, CSV or Parquet file with their paths",
        )
    return source.path.parent


def sound_in(row: Row, folder: Path) -> Path:
    """Return where the sound of a row lies.

    Args:
        row: of the data.
        folder: that of the data.

    Raises:
        LlmoptError: the row names none.
    """
    name = row.values[AUDIO.name]
    if isinstance(name, str) and name:
        return folder / name
    raise LlmoptError(
        f"the audio in {row.place} is no path",
        where=f"it holds {name!r:.80}",
        hint="write there the path of a WAV file, or name another column with --column",
    )
