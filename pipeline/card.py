"""The model card of an artifact, README.md, and what the source's own card says of its license."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from ..core.manifest import Manifest

CARD = "README.md"
_MOST = 1 << 20
_LICENSE = ("license", "license_name", "license_link")
_TEXT = re.compile(r"[\w.:/+ -]{1,200}")


def write_card(manifest: Manifest, root: Path) -> Path:
    """Write the model card of the artifact in `root`: the same bytes for the same manifest and files."""
    from ..evaluation.report.card import card

    path = root / CARD
    path.write_text(card(_entry(manifest, root)), encoding="utf-8")
    return path


def _entry(manifest: Manifest, root: Path) -> Any:
    from .entry import artifact_entry

    return artifact_entry(manifest, root, name="", path=".")


def license_of(folder: Path) -> dict[str, str]:
    """Return `license`, `license_name` and `license_link` of the header of a folder's README.md, as far as it has them.

    A header that cannot be read says nothing.
    """
    import yaml

    path = folder / CARD
    try:
        with path.open(encoding="utf-8") as stream:
            text = stream.read(_MOST)
        match = re.match(r"---\r?\n(.*?)\r?\n---\s", text, re.DOTALL)
        header = yaml.safe_load(match[1]) if match and "&" not in match[1] else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return {}
    if not isinstance(header, dict):
        return {}
    found = cast("dict[str, Any]", header)
    return {key: found[key] for key in _LICENSE if isinstance(found.get(key), str) and _TEXT.fullmatch(found[key])}
