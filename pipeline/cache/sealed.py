"""Small files that appear whole, and that tell when a byte of them has changed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_DIGEST = hashlib.sha256().digest_size


class DamagedError(Exception):
    """A file is not what was written."""


def pack(content: Any) -> bytes:
    """Return plain data as bytes: MessagePack rather than JSON, which has neither NaN nor infinity."""
    return msgspec.msgpack.encode(content, enc_hook=_plain)


def unpack(data: bytes, kind: type[T]) -> T:
    """Return what `pack` was given."""
    return msgspec.msgpack.decode(data, type=kind)


def write_sealed(path: Path, content: Any) -> None:
    """Write plain data, SHA-256 first, aside and then in place.

    Nothing waits for the disk: a file that a power failure has torn is found by its hash, and what it told of is made
    anew.
    """
    data = pack(content)
    aside = path.with_name(f"{path.name}.new")
    aside.write_bytes(hashlib.sha256(data).digest() + data)
    aside.replace(path)


def read_sealed(path: Path, kind: type[T]) -> T:
    """Return what `write_sealed` wrote.

    Raises:
        DamagedError: it is not there, or not as it was written, or by a version that wrote something else.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{path.name}: {(error.strerror or 'unreadable').lower()}") from None
    data = raw[_DIGEST:]
    if hashlib.sha256(data).digest() != raw[:_DIGEST]:
        raise DamagedError(f"{path.name} is not what was written")
    try:
        return unpack(data, kind)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise DamagedError(f"{path.name}: {error}") from None


def _plain(value: Any) -> Any:
    """Return a number of numpy or torch as one of Python."""
    item = getattr(value, "item", None)
    if callable(item):
        return item()
    raise NotImplementedError(f"{type(value).__name__} is no plain data")
