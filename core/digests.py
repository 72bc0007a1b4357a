"""SHA-256 of files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

Digest = Callable[[Path], str]
"""Gives the SHA-256 of a file, in hexadecimal digits."""


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_sha256(files: Iterable[tuple[str, Path]], digest: Digest = file_sha256) -> str:
    """Return one hash over the names and the bytes of files, in the order in which they come.

    Args:
        files: what each is called, and where it lies.
        digest: gives the hash of one, where that is known already.
    """
    whole = hashlib.sha256()
    for name, path in files:
        whole.update(name.encode() + b"\0" + bytes.fromhex(digest(path)))
    return whole.hexdigest()
