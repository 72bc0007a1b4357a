"""Ctrl-C and SIGTERM in the middle of a run: gone within moments, nothing left, the former artifact whole."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from broken import TINY, tree

BEGINNINGS = {
    "importing": "",
    "calibration": "note: calibration:",
    "sweep": "gptq: 0/4",
    "export": "writing safetensors: 0/",
    "verifying": "verifying safetensors",
    "tracing": "tracing to ONNX: 0/",
}


def start(folder, *options):
    arguments = [sys.executable, "-m", "llmopt", "quantize", TINY, "-o", "out", "--group-size", "64", *options]
    calibration = ["--calibration", TINY / "calibration.txt", "--samples", "32", "--length", "128"]
    exports = ["--export", "safetensors", "--export", "onnx"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [str(argument) for argument in (*arguments, *calibration, *exports)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_a_signal(shell, artifact, beginning, number, code, said):
    former = beginning != "importing"
    if former:
        shutil.copytree(artifact, "out")
    before = tree(shell.folder)
    process = start(shell.folder, *(["--force"] if former else []))
    told = []
    if BEGINNINGS[beginning]:
        for line in process.stderr:
            told.append(line)
            if line.startswith(BEGINNINGS[beginning]):
                break
    else:
        time.sleep(1.0)
    sent = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    took = time.monotonic() - sent
    assert process.returncode == code, "".join(told) + err
    assert err.splitlines()[-1] == said
    assert "Traceback" not in err
    assert out == ""
    assert tree(shell.folder) == before
    assert took < 10  # 2 s on an idle machine


def test_ctrl_c_twice(shell):
    """As wrappers send it, once of their own and once for the process group: the tidying is not cut short."""
    process = start(shell.folder)
    for line in process.stderr:
        if line.startswith("gptq: 0/4"):
            break
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert tree(shell.folder) == {}


def test_ctrl_c_as_json(shell):
    import json

    process = start(shell.folder, "--json")
    for line in process.stderr:
        if line.startswith("gptq: 0/4"):
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert json.loads(out) == {"error": "interrupted", "where": None, "hint": None, "exit_code": 130}
