"""SIGINT and SIGTERM end the process within two seconds wherever they hit, also in native code, and leave nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
PROMPT = 2.0
"""Seconds; twice as many on a machine that does other things too."""

NATIVE = """
import sys
from hashlib import pbkdf2_hmac
from pathlib import Path
import llmopt.__main__ as entry
from llmopt.core.ends import scratch
from llmopt.pipeline.output import staging

def run(arguments):
    with staging(Path("made/for/out"), force=False) as stage, scratch() as folder:
        (stage.root / "half.txt").write_text("written")
        print(folder, flush=True)
        pbkdf2_hmac("sha256", b"", b"", 400_000_000)  # minutes in one call, the interpreter's lock released

entry._run = run
sys.exit(entry.main(sys.argv[1:]))
"""

COMMITTING = """
import sys, time
from pathlib import Path
import llmopt.__main__ as entry
import llmopt.pipeline.output as output

def slowly(new, place):
    end = time.monotonic() + 2.5
    told = False
    while True:
        try:
            if not told:
                told = True
                print("ready", flush=True)
            while time.monotonic() < end:
                time.sleep(0.1)
            break
        except BaseException:  # as native code, it does not heed the signal
            pass
    new.rename(place)

def run(arguments):
    output.replace_folder = slowly
    with output.staging(Path("out"), force=False) as stage:
        (stage.root / "whole.txt").write_text("written")
        stage.commit()

entry._run = run
sys.exit(entry.main([]))
"""

WORKING = """
import sys, time
import llmopt.__main__ as entry
from llmopt.pipeline import bench

class Texts:
    batches, padding = [], 0

def run(arguments):
    artifact = bench.open_artifact(arguments[0])
    options = {"prompt_tokens": 8, "new_tokens": 8, "threads": 1}
    with bench.working(artifact.directory, artifact.runtime(), options, Texts()) as worker:
        print(worker._process.pid, flush=True)
        time.sleep(60)

entry._run = run
sys.exit(entry.main(sys.argv[1:]))
"""


def start(program, folder, *arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes | options)


def end(process, number):
    """Send a signal; return what was said, and how long it took."""
    sent = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return out, err, time.monotonic() - sent


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_native_code_does_not_delay_the_end(tmp_path, number, code, said):
    process = start(NATIVE, tmp_path)
    folder = Path(process.stdout.readline().strip())
    assert folder.is_dir()
    _, err, took = end(process, number)
    assert (process.returncode, err) == (code, f"{said}\n")
    assert took < 2 * PROMPT
    assert list(tmp_path.iterdir()) == []
    assert not folder.exists()


def test_json_is_told_too(tmp_path):
    process = start(NATIVE, tmp_path, "--json")
    process.stdout.readline()
    out, _, _ = end(process, signal.SIGTERM)
    assert '"exit_code": 143' in out


def test_an_artifact_that_is_being_put_in_place_is_not_torn(tmp_path):
    process = start(COMMITTING, tmp_path)
    assert process.stdout.readline() == "ready\n"
    end(process, signal.SIGTERM)
    assert process.returncode == 143
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/whole.txt"]


def test_the_processes_of_bench_end_with_it(tmp_path):
    process = start(WORKING, tmp_path, TINY)
    child = int(process.stdout.readline())
    _, err, took = end(process, signal.SIGTERM)
    assert (process.returncode, err) == (143, "terminated\n")
    assert took < 2 * PROMPT
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_the_bar_is_cleared(tmp_path):
    pty = pytest.importorskip("pty")
    import select

    above, below = pty.openpty()
    arguments = ["quantize", TINY, "-o", "out", "--group-size", "64", "--export", "onnx"]
    program = "import sys; from llmopt.__main__ import main; sys.exit(main(sys.argv[1:]))"
    process = start(program, tmp_path, *arguments, stderr=below, stdout=subprocess.DEVNULL)
    told = b""
    while b"tracing" not in told:
        told += os.read(above, 4096)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert time.monotonic() - sent < 2 * PROMPT
    # This end of the terminal stays open until all is read: what was written last may be lost with the last of them.
    while select.select([above], [], [], 1)[0]:
        told += os.read(above, 4096)
    os.close(below)
    os.close(above)
    assert told.rstrip().endswith(b"interrupted")
    assert told.rindex(b"\x1b[?25h") > told.rindex(b"\x1b[?25l")  # the cursor is shown again
    assert list(tmp_path.iterdir()) == []


def test_training_ends_too(tmp_path):
    options = ["--teacher", TINY, "--data", TINY / "calibration.txt", "--length", "64", "--steps", "5000"]
    program = "import sys; from llmopt.__main__ import main; sys.exit(main(sys.argv[1:]))"
    process = start(program, tmp_path, "distill", TINY, "-o", "out", *options)
    for line in process.stderr:
        if line.startswith("distill"):
            break
    time.sleep(0.5)
    _, err, took = end(process, signal.SIGTERM)
    assert (process.returncode, err.splitlines()[-1]) == (143, "terminated")
    assert took < 2 * PROMPT
    assert list(tmp_path.iterdir()) == []
