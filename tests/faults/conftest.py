"""What the readers of hostile files are tried on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hostile import TINY

if not sys.platform.startswith("linux"):
    pytest.skip("limits of memory are set as Linux has them", allow_module_level=True)


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact of the bundled model: rtn, safetensors."""
    from helpers import build, recipe

    folder = tmp_path_factory.mktemp("hostile") / "artifact"
    build(recipe(TINY, ("rtn", {"bits": 4, "group_size": 64})), folder)
    return folder
