"""Files that others wrote: read in bounded time and memory, and never from outside the folder they belong to."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, cast

from .errors import LlmoptError

MAX_JSON = 100 << 20
"""Bytes of the largest JSON file that is read; the largest tokenizers have some 60 MB."""

MAX_VALUES = 4_000_000
"""Values of the largest JSON file; Python takes some 100 bytes for each, whatever they take in the file."""

_MAX_NAME = 255
_MAX_DEPTH = 64
_PIECE = 1 << 20
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_COUNTS = (
    (re.compile(r"(layers?|blocks?|experts|depths?|stages)$"), 4096),
    (
        re.compile(r"(positions?|position_embeddings|ctx|labels|sizes?|dims?|heads|d_model|d_ff|d_kv|n_embd|n_inner)$"),
        1 << 25,
    ),
)
"""What a field of config.json counts, by its name, and how many of it a model may have: libraries make them all."""


class UnreadableError(ValueError):
    """A file that is not what it should be; the message says why, in a few words.

    Attributes:
        path: the file, where it is known.
    """

    path: Path | None = None


def read_json(path: Path, *, limit: int = MAX_JSON, unique: bool = False) -> Any:
    """Return what a JSON file holds.

    Args:
        path: the file.
        limit: bytes that it may have.
        unique: refuse a key that stands twice in one object.

    Raises:
        UnreadableError: it is no JSON, or too large, or nested too deeply.
        OSError: there is no such file, or it cannot be read.
    """
    with _named(path):
        _check_size(path, limit)
        with path.open("rb") as stream:
            raw = stream.read(limit + 1)
        return parse_json(raw, unique=unique)


def parse_json(raw: bytes, *, unique: bool = False) -> Any:
    """Return what JSON in UTF-8 stands for; see `read_json`.

    Raises:
        UnreadableError: it is no JSON, or holds too much, or is nested too deeply.
    """
    check_values(raw.count(b",") + raw.count(b"[") + raw.count(b"{"))
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique if unique else None)
        if _SURROGATE.search(raw):
            json.dumps(document, ensure_ascii=False).encode()  # half a pair is no text, and cannot be written again
        _check_depth(document)
    except RecursionError:
        raise UnreadableError("it is nested too deeply") from None
    except UnreadableError:
        raise
    except ValueError as error:  # no UTF-8, no JSON, a number of thousands of digits
        raise UnreadableError(" ".join(str(error).split())[:300]) from None
    return document


def _check_depth(document: Any) -> None:
    """Refuse what is nested so deeply that whatever walks through it by calling itself ends in an error."""
    level: list[Any] = [document] if isinstance(document, dict | list) else []
    for _ in range(_MAX_DEPTH):
        held = (cast("dict[str, Any]", each).values() if isinstance(each, dict) else each for each in level)
        level = [value for values in held for value in values if isinstance(value, dict | list)]
        if not level:
            return
    raise UnreadableError(f"it is nested more than {_MAX_DEPTH} levels deep")


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a config.json that asks for more layers, positions or labels than any model has.

    Raises:
        UnreadableError: it names the field.
    """
    for name, value in _numbers(config, ""):
        for pattern, limit in _COUNTS:
            if pattern.search(name) and not 0 <= abs(value) <= limit:
                raise UnreadableError(f"`{name}` is {str(value)[:20]}, and no model has more than {limit}")


def _numbers(value: Any, name: str) -> Iterator[tuple[str, int | float]]:
    if isinstance(value, dict):
        for key, inner in cast("dict[str, Any]", value).items():
            yield from _numbers(inner, key)
    elif isinstance(value, list):
        for inner in cast("list[Any]", value):
            yield from _numbers(inner, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def check_values(count: int) -> None:
    """Refuse a document of more values than memory is meant for.

    Raises:
        UnreadableError: it says how many are read.
    """
    if count > MAX_VALUES:
        raise UnreadableError(f"it holds more than the {MAX_VALUES} values that are read")


def check_json_size(path: Path, *, limit: int = MAX_JSON) -> None:
    """Refuse a JSON file that a library would read whole, if it is too large for that; it is not parsed.

    Raises:
        UnreadableError: it has too many bytes or values.
    """
    count = 0
    with _named(path):
        _check_size(path, limit)
        with path.open("rb") as stream:
            while piece := stream.read(_PIECE):
                count += piece.count(b",") + piece.count(b"[") + piece.count(b"{")
                check_values(count)


@contextmanager
def _named(path: Path) -> Generator[None]:
    """Let an error know the file that it is about."""
    try:
        yield
    except UnreadableError as error:
        error.path = path
        raise


def _check_size(path: Path, limit: int) -> None:
    size = path.stat().st_size
    if size > limit:
        raise UnreadableError(f"it has {size} bytes, more than the {limit} that are read")
    if not path.is_file():
        raise UnreadableError("it is no file")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise UnreadableError(f"{twice!r} stands in it twice")
    return found


def is_plain_name(name: object) -> bool:
    """Return whether `name` is a file name without a path, and can be shown and written as it is."""
    return isinstance(name, str) and is_inner_path(name) and "/" not in name and name != "."


def is_inner_path(name: object) -> bool:
    """Return whether `name` is a relative path with `/` that stays in its folder, such as `onnx/model.onnx`, or `.`."""
    if not isinstance(name, str) or not 0 < len(name) < 1024 or not name.isprintable():
        return False
    path = PurePosixPath(name)
    if any(len(part.encode()) > _MAX_NAME for part in path.parts):
        return False
    parted = "\\" in name or ":" in path.parts[0] if path.parts else False  # a path, or a drive, of Windows
    return not path.is_absolute() and ".." not in path.parts and not parted


def lies_in(path: Path, folder: Path) -> bool:
    """Return whether a file, links followed, lies in `folder`, or where the hub's cache keeps the files of it.

    The cache has a folder of links for each commit: `models--org--name/snapshots/COMMIT/file` leads to
    `models--org--name/blobs/HASH`.
    """
    try:
        place, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError):  # a ring of links, a name that no file can have
        return False
    if place.is_relative_to(root):
        return True
    cache = next((above.parent for above in (root, *root.parents) if above.name == "snapshots"), None)
    return cache is not None and place.parent == cache / "blobs"


def check_links(folder: Path, *patterns: str) -> None:
    """Refuse a folder with a link that leads out of it: what it leads to would be read as a part of the model.

    Args:
        folder: the folder.
        patterns: which of its files are asked about.

    Raises:
        LlmoptError: it names the link.
    """
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_symlink() and not lies_in(path, folder):
                raise LlmoptError(
                    f"`{path.name}` is a link that leads out of its folder",
                    where=f"{path} -> {path.readlink()}",
                    hint="put the file itself into the folder, or give the folder that it lies in",
                )
