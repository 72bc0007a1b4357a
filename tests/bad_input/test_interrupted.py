"""Ctrl-C and SIGTERM in the middle of a run: gone within moments, nothing left, the former artifact whole."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from broken import TINY, tree

MOMENTS = {
    "importing": (None, signal.SIGINT, 130, "interrupted"),
    "sweep": ("gptq: 0/4", signal.SIGINT, 130, "interrupted"),
    "export": ("writing safetensors: 0/", signal.SIGTERM, 143, "terminated"),
    "verifying": ("verifying safetensors", signal.SIGINT, 130, "interrupted"),
    "tracing": ("tracing to ONNX: 0/", signal.SIGTERM, 143, "terminated"),
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


def wait_for(process, beginning):
    """Return what the process says up to the line that begins so."""
    told = []
    for line in process.stderr:
        told.append(line)
        if line.startswith(beginning):
            break
    return "".join(told)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal(shell, artifact, moment):
    beginning, number, code, said = MOMENTS[moment]
    if beginning is not None:
        shutil.copytree(artifact, "out")
    before = tree(shell.folder)
    process = start(shell.folder, *([] if beginning is None else ["--force"]))
    told = "" if beginning is None else wait_for(process, beginning)
    if beginning is None:
        time.sleep(1.0)
    sent = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    took = time.monotonic() - sent
    assert process.returncode == code, told + err
    assert err.splitlines()[-1] == said
    assert "Traceback" not in err
    assert out == ""
    assert tree(shell.folder) == before
    assert took < 10  # 2 s on an idle machine


def test_ctrl_c_twice(shell):
    """As wrappers send it, once of their own and once for the process group: the tidying is not cut short."""
    process = start(shell.folder)
    wait_for(process, "gptq: 0/4")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert tree(shell.folder) == {}


IN_A_STRING = """
import sys
import llmopt.__main__ as entry
import llmopt.core.errors

def run(arguments):
    exec("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(10)")

entry._run = run
sys.exit(entry.main([]))
"""


def test_ctrl_c_while_a_library_makes_code_from_a_string(shell):
    """As dataclasses do at import. The interpreter must not end itself by the signal there: the status is ours."""
    (shell.folder / "entered.py").write_text(IN_A_STRING, encoding="utf-8")
    command = [sys.executable, "-m", "entered"]  # only with `-m` does the interpreter do so
    ended = subprocess.run(command, cwd=shell.folder, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 130, ended.stderr
    assert ended.stderr == "interrupted\n"
