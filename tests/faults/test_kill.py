"""Kill -9 at any moment: the next run goes on where the killed one was, and makes the same bytes.

`KILLS=50 python -m pytest tests/faults/test_kill.py -s` kills fifty runs and tells when each of them ended.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


def start(folder, cache):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LLMOPT_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "llmopt", "run", "recipe.yaml", "-o", "out", "-v"]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def tree(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the artifact of a run that nobody killed, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "recipe.yaml").write_text(RECIPE)
    begun = time.monotonic()
    err = start(folder, folder / "cache").communicate(timeout=300)[1]
    seconds = time.monotonic() - begun
    assert (folder / "out").is_dir(), err
    return tree(folder / "out"), seconds


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_goes_on_to_the_same_bytes(number, whole, tmp_path):
    expected, seconds = whole
    # Spread over the whole run, and drawn anew within each part of it.
    moment = seconds * (number + random.Random(number).random()) / KILLS
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    killed = start(tmp_path, tmp_path / "cache")
    try:
        killed.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        killed.send_signal(signal.SIGKILL)
    told = killed.communicate(timeout=60)[1]
    if (tmp_path / "out").exists():  # killed behind the last rename, or not at all
        assert tree(tmp_path / "out") == expected
        (tmp_path / "out").rename(tmp_path / "former")
    again = start(tmp_path, tmp_path / "cache")
    err = again.communicate(timeout=300)[1]
    assert again.returncode == 0, err
    assert tree(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".out.*")), "what the killed run left is removed"
    last = (told.splitlines() or ["nothing said yet"])[-1]
    used = [line for line in err.splitlines() if "from the cache" in line or "going on after" in line]
    print(f"\nkilled at {moment:.2f} s ({last}); then {'; '.join(used) or 'from the beginning'}")
