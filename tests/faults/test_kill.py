"""Kill -9 at any moment: the next run goes on where the killed one was, and makes the same bytes.

`KILLS=50 python -m pytest tests/faults/test_kill.py -s` kills fifty runs and tells when each of them ended.
"""

import contextlib
import hashlib
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import pytest
from llmopt.core.manifest import RUN

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


def work(folder):
    """Run the command line in a process of its own, what it says going to a file."""
    os.chdir(folder)
    os.environ |= {"LLMOPT_CACHE_DIR": str(folder / "cache"), "LLMOPT_CACHE_SIZE": "1GiB"}
    import torch

    torch.set_num_threads(1)
    with Path("said").open("w", buffering=1) as said:
        sys.stderr = said
        with contextlib.redirect_stdout(said):
            from llmopt.__main__ import main

            code = main(["run", "recipe.yaml", "-o", "out", "-v"])
    os._exit(code)


@pytest.fixture(scope="module")
def processes():
    """Return a context whose processes begin with everything imported: what is killed is the work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmopt.pipeline.run", "llmopt.passes.gptq", "transformers.models.llama"])
    return context


def start(processes, folder):
    """Start a run and return it once it is at work."""
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "said").unlink(missing_ok=True)
    process = processes.Process(target=work, args=(folder,))
    process.start()
    while process.is_alive() and not ((folder / "said").exists() and (folder / "said").stat().st_size):
        time.sleep(0.01)
    return process


def tree(folder):
    """Return a hash of every file but the record of how the run went, which holds times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RUN)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def whole(processes, tmp_path_factory):
    """Return the artifact of a run that nobody killed, and the seconds that its work took."""
    seconds = 0.0
    for name in ("warm", "whole"):
        folder = tmp_path_factory.mktemp(name)
        process, begun = start(processes, folder), time.monotonic()
        process.join(timeout=300)
        seconds = time.monotonic() - begun
        assert process.exitcode == 0, (folder / "said").read_text()
    return tree(folder / "out"), seconds


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_goes_on_to_the_same_bytes(number, whole, processes, tmp_path):
    expected, seconds = whole
    # Spread over the whole run, and drawn within each part of it.
    moment = seconds * (number + random.Random(number).random()) / KILLS
    killed = start(processes, tmp_path)
    killed.join(timeout=moment)
    killed.kill()
    killed.join()
    told = (tmp_path / "said").read_text().splitlines()
    if (tmp_path / "out").exists():  # killed behind the last rename, or not at all
        assert tree(tmp_path / "out") == expected
        (tmp_path / "out").rename(tmp_path / "former")
    again = start(processes, tmp_path)
    again.join(timeout=300)
    said = (tmp_path / "said").read_text()
    assert again.exitcode == 0, said
    assert tree(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".out.*")), "what the killed run left is removed"
    used = [line for line in said.splitlines() if "from the cache" in line or "going on after" in line]
    if any(line.startswith(("gptq: 2/4", "gptq: 3/4", "gptq: 4/4")) for line in told):
        assert any(line.startswith(("note: gptq: from the cache", "note: gptq: going on after")) for line in used), said
    print(f"\nkilled after {moment:.2f} s of {seconds:.2f} at `{told[-1]}`; then {used or 'from the beginning'}")
