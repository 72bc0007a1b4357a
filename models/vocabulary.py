"""Which id a tokenizer gives to which string, and how two tokenizers compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.untrusted import read_json


def vocabulary(folder: Path, *, trust_remote_code: bool = False) -> dict[str, int]:
    """Return the id of every token of a folder's tokenizer; read from tokenizer.json where there is one.

    Raises:
        UsageError: there is no tokenizer that can be loaded.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return _listed(read_json(path))
        except (ValueError, LookupError, TypeError, AttributeError):
            pass  # another layout of the file: the library reads it, or says what is wrong with it
    from .text import load_tokenizer

    return dict(load_tokenizer(folder, trust_remote_code=trust_remote_code).get_vocab())


def _listed(content: dict[str, Any]) -> dict[str, int]:
    words = content["model"]["vocab"]
    # BPE and WordPiece list ids by token, Unigram lists tokens with their scores in the order of their ids.
    ids = dict(words) if isinstance(words, dict) else {str(pair[0]): index for index, pair in enumerate(words)}
    return ids | {str(one["content"]): int(one["id"]) for one in content.get("added_tokens", ())}


def ids_in(student: dict[str, int], teacher: dict[str, int]) -> list[int] | None:
    """Return, for each id of the student, the teacher's id of the same token; -1 where it has none.

    Returns:
        None when both vocabularies are the same.
    """
    if student == teacher:
        return None
    found = [-1] * (max(student.values(), default=-1) + 1)
    for token, index in student.items():
        found[index] = teacher.get(token, -1)
    return found
