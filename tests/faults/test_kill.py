"""Kill -9 at any moment: the next run goes on where the killed one was, and makes the same bytes.

`KILLS=50 python -m pytest tests/faults/test_kill.py -s` kills fifty runs and tells when each of them ended.
"""

import hashlib
import os
import random
import time
from pathlib import Path

import pytest
from llmopt.core.manifest import RUN
from processes import command

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
KILLS = int(os.environ.get("KILLS", "4"))
RECIPE = f"""
model: {TINY}
calibration: {{data: {TINY / "calibration.txt"}, samples: 48, length: 128}}
passes:
- rotate
- gptq: {{group_size: 64}}
exports: [safetensors]
"""


def start(folder):
    """Start a run and return it once it is at work."""
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "said").unlink(missing_ok=True)
    variables = {"LLMOPT_CACHE_DIR": str(folder / "cache"), "LLMOPT_CACHE_SIZE": "1GiB"}
    process = command(folder, "run", "recipe.yaml", "-o", "out", "-v", said=folder / "said", **variables)
    while process.is_alive() and not ((folder / "said").exists() and (folder / "said").stat().st_size):
        time.sleep(0.01)
    return process


def tree(folder):
    """Return a hash of every file but the record of how the run went, which holds times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RUN)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the artifact of a run that nobody killed, and the seconds that its work took."""
    seconds = 0.0
    for name in ("warm", "whole"):
        folder = tmp_path_factory.mktemp(name)
        process, begun = start(folder), time.monotonic()
        process.join(timeout=300)
        seconds = time.monotonic() - begun
        assert process.exitcode == 0, (folder / "said").read_text()
    return tree(folder / "out"), seconds


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_goes_on_to_the_same_bytes(number, whole, tmp_path):
    expected, seconds = whole
    # Spread over the whole run, and drawn within each part of it.
    moment = seconds * (number + random.Random(number).random()) / KILLS
    killed = start(tmp_path)
    killed.join(timeout=moment)
    killed.kill()
    killed.join()
    told = (tmp_path / "said").read_text().splitlines()
    if (tmp_path / "out").exists():  # killed behind the last rename, or not at all
        assert tree(tmp_path / "out") == expected
        (tmp_path / "out").rename(tmp_path / "former")
    again = start(tmp_path)
    again.join(timeout=300)
    said = (tmp_path / "said").read_text()
    assert again.exitcode == 0, said
    assert tree(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".out.*")), "what the killed run left is removed"
    used = [line for line in said.splitlines() if "from the cache" in line or "going on after" in line]
    if any(line.startswith(("gptq: 2/4", "gptq: 3/4", "gptq: 4/4")) for line in told):
        assert any(line.startswith(("note: gptq: from the cache", "note: gptq: going on after")) for line in used), said
    print(f"\nkilled after {moment:.2f} s of {seconds:.2f} at `{told[-1]}`; then {used or 'from the beginning'}")
