"""push and pull, with a hub on localhost, in processes of their own as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fake_hub import Hub, serving
from helpers import build, recipe
from llmopt.core.errors import UnmetError, UsageError
from llmopt.core.manifest import RUN, GateRecord
from llmopt.core.progress import Silent
from llmopt.pipeline.publish import push

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
REPO = "org/tiny-int4"
TOKEN = "hf_ThisIsTheTokenOfATest0123"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact of the bundled model: rtn, safetensors."""
    folder = tmp_path_factory.mktemp("publish") / "artifact"
    build(recipe(TINY, ("rtn", {"bits": 4, "group_size": 64})), folder)
    return folder


@pytest.fixture
def artifact(built: Path, tmp_path: Path) -> Path:
    """Return a copy of the artifact."""
    return Path(shutil.copytree(built, tmp_path / "artifact"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Return a hub that runs."""
    with serving() as running:
        yield running


def llmopt(hub: Hub, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command that knows the hub, with a token."""
    own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-m", "llmopt", *arguments],
        cwd=folder,
        env={**kept, **own, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert TOKEN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_there_and_back(hub: Hub, artifact: Path, tmp_path: Path):
    done = llmopt(hub, tmp_path, "push", "artifact", REPO, "--json")
    assert done.returncode == 0, done.stderr
    assert hub.private[REPO]
    assert hub.files(REPO) == contents(artifact)
    assert f"Bearer {TOKEN}" in hub.tokens
    assert json.loads(done.stdout)["commit"] == hub.sha(REPO)

    done = llmopt(hub, tmp_path, "pull", REPO, "-o", "back", "--json")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "back") == contents(artifact)
    assert json.loads(done.stdout)["commit"] == hub.sha(REPO)
    done = llmopt(hub, tmp_path, "pull", REPO, "-o", "back")
    assert done.returncode == 2
    assert "exists already" in done.stderr


def test_an_upload_that_breaks_goes_on(hub: Hub, artifact: Path, tmp_path: Path):
    hub.fail_after = 1
    done = llmopt(hub, tmp_path, "push", "artifact", REPO)
    assert done.returncode == 1, done.stderr
    assert "run the same again" in done.stderr
    assert hub.files(REPO) == {}, "half an artifact is on the hub"
    assert len(hub.uploads) == 1
    hub.fail_after = None
    done = llmopt(hub, tmp_path, "push", "artifact", REPO, "--message", "again")
    assert done.returncode == 0, done.stderr
    assert hub.files(REPO) == contents(artifact)
    assert len(hub.uploads) == len(set(hub.uploads)), "a file was sent twice"
    assert hub.messages == ["again"]


@pytest.mark.parametrize("change", ["changed", "path", "secret", "no-manifest"])
def test_what_the_hub_gives_is_checked(hub: Hub, artifact: Path, tmp_path: Path, change: str):
    files = contents(artifact)
    if change == "changed":
        files["config.json"] = files["config.json"].replace(b"1", b"2", 1)
    elif change == "no-manifest":
        del files["llmopt.json"]
    else:
        manifest = json.loads(files["llmopt.json"])
        name = "../outside" if change == "path" else "/etc/outside"
        manifest["exports"][0]["files"][name] = {"bytes": 1, "sha256": "0"}
        files["llmopt.json"] = json.dumps(manifest).encode()
    hub.commits[REPO] = [files]
    done = llmopt(hub, tmp_path, "pull", REPO, "-o", "back")
    assert done.returncode in {1, 3}, done.stderr
    assert done.stderr.count("error: ") == 1
    assert not (tmp_path / "back").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".back")]


def test_a_repository_that_is_not_there(hub: Hub, tmp_path: Path):
    done = llmopt(hub, tmp_path, "pull", "org/none")
    assert done.returncode == 1
    assert "the hub refuses `org/none`" in done.stderr


@pytest.mark.parametrize("arguments", [("push", "artifact", REPO), ("pull", REPO)])
def test_offline(hub: Hub, artifact: Path, tmp_path: Path, arguments: tuple[str, ...]):
    done = llmopt(hub, tmp_path, *arguments, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert hub.commits == {}


def send(folder: Path, repository: str = REPO) -> Any:
    return push(folder, repository, public=False, branch=None, message=None, reporter=Silent())


def test_what_is_not_sent(artifact: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="is no repository of the hub"):
        send(artifact, "tiny")
    with pytest.raises(UsageError, match="is no artifact of llmopt"):
        send(TINY)
    run = json.loads((artifact / RUN).read_text())
    unmet = GateRecord(
        text="size_ratio<=0.1",
        metric="size_ratio",
        value=0.3,
        low=None,
        high=None,
        limit=0.1,
        comparison="<=",
        unit="ratio",
        verdict="failed",
        samples=0,
        export="safetensors",
    )
    (artifact / RUN).write_text(json.dumps(run | {"gates": [msgspec.to_builtins(unmet)]}))
    with pytest.raises(UnmetError, match="a gate of"):
        send(artifact)
    manifest = json.loads((artifact / "llmopt.json").read_text())
    manifest["exports"][0]["verification"]["passed"] = False
    (artifact / "llmopt.json").write_text(json.dumps(manifest))
    with pytest.raises(UnmetError, match="the verification of"):
        send(artifact)


def test_a_changed_or_linked_file_is_not_sent(artifact: Path, tmp_path: Path):
    path = artifact / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UnmetError, match="was changed"):
        send(artifact)
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(data)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnmetError, match="leads out of the artifact"):
        send(artifact)
