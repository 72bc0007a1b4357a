"""The real command line on input that is wrong: what it says, what it returns, and that it leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from broken import TINY, Shell, copy_tiny


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact of the bundled model: rtn, safetensors."""
    from helpers import build, recipe

    folder = tmp_path_factory.mktemp("former") / "artifact"
    build(recipe(TINY, ("rtn", {"bits": 4, "group_size": 64})), folder)
    return folder


@pytest.fixture
def shell(tmp_path: Path, artifact: Path, capsys: Any, monkeypatch: Any) -> Shell:
    """Return a shell in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return Shell(tmp_path, artifact, capsys)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a copy of the bundled model, to be damaged."""
    copy_tiny(tmp_path / "model")
    return Path("model")
