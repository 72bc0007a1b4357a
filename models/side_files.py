"""The files beside a model's weights that its users need too: tokenizer, processor, generation settings."""

from __future__ import annotations

import shutil
from glob import escape
from pathlib import Path

from ..core.untrusted import check_links
from .sentence import MODULES

PATTERNS = ("*.json", "vocab*.txt", "merges.txt", "*.model", "*.jinja", "*.tiktoken")
_OTHERS = frozenset(
    {
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "genai_config.json",
        "llmopt.json",
        "llmopt.reference.json",
        "llmopt.run.json",
        MODULES,
    }
)


def side_files(folder: Path, *, with_config: bool = False, with_code: bool = False) -> list[Path]:
    """Return the side files of the model in `folder`.

    Args:
        folder: the model's.
        with_config: config.json as well.
        with_code: Python files as well.
    """
    others = _OTHERS if with_config else _OTHERS | {"config.json"}
    patterns = (*PATTERNS, "*.py") if with_code else PATTERNS
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() and path.name not in others)


def copy_side_files(folder: Path, directory: Path, *, with_config: bool = False, with_code: bool = False) -> None:
    """Copy the side files of the model in `folder` to `directory`; see `side_files`."""
    for path in side_files(folder, with_config=with_config, with_code=with_code):
        check_links(folder, escape(path.name))
        shutil.copyfile(path, directory / path.name)
