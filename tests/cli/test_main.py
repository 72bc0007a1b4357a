"""Whatever ends a command: one message, the right exit code, no traceback unless asked for."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from llmopt.core.errors import LlmoptError, UnmetError, UsageError


@pytest.fixture
def failing(pipeline, llmopt, monkeypatch):
    """Return a function that runs a command in which `error` is raised."""

    def run(error, *more):
        def make_plan(recipe, **_):
            raise error

        monkeypatch.setattr(sys.modules["llmopt.pipeline.plan"], "make_plan", make_plan)
        return llmopt("quantize", "model", "-o", "out", *more)

    return run


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["quantise"], "unknown command `quantise`", "did you mean `quantize`?"),
        (["--verson"], "unknown option --verson", "did you mean `--version`?"),
        (["quantize"], "missing MODEL", "`llmopt quantize --help` shows how to call it"),
        (["quantize", "m", "--grup-size", "8"], "unknown option --grup-size", "did you mean `--group-size`?"),
        (["quantize", "m", "--bits", "4"], "unknown option --bits", "did you mean `--scheme`?"),
        (["quantize", "m", "--device", "cpu"], "unknown option --device", "`llmopt quantize --help` lists the options"),
        (["infer", "m", "--bits", "4"], "unknown option --bits", "`llmopt infer --help` lists the options"),
        (["quantize", "m", "--zzz"], "unknown option --zzz", "`llmopt quantize --help` lists the options"),
        (["quantize", "m", "other"], "unexpected argument other", "`llmopt quantize --help` lists the options"),
        (["eval", "m"], "missing --data", "`llmopt eval --help` shows how to call it"),
        (["quantize", "m", "-q", "-v"], "--quiet and --verbose exclude each other", None),
        (["passes", "gtpq"], "unknown pass or exporter `gtpq`", "did you mean `gptq`?"),
    ],
)
def test_bad_usage(llmopt, arguments, message, hint):
    ended = llmopt(*arguments)
    assert (ended.code, ended.out) == (2, "")
    lines = [line for line in ended.err.splitlines() if line.startswith(("error:", "hint:"))]
    assert lines == [f"error: {message}", *([f"hint: {hint}"] if hint else [])]
    assert ("Traceback" in ended.err) == ("-v" in arguments)


def test_a_value_that_is_no_number_names_its_option(llmopt):
    ended = llmopt("bench", "m", "--repeats", "many")
    assert ended.code == 2
    assert ended.err.startswith("error: bad value for --repeats: ")


@pytest.mark.parametrize(("kind", "code"), [(LlmoptError, 1), (UsageError, 2), (UnmetError, 3)])
def test_errors_of_ours(failing, kind, code):
    ended = failing(kind("it failed", where="here\nand there", hint="do this"))
    assert ended == (code, "", "error: it failed\n  here\n  and there\nhint: do this\n")


def test_json_mode_prints_the_error_as_json_too(failing):
    ended = failing(UnmetError("it failed", where="here"), "--json")
    assert json.loads(ended.out) == {"error": "it failed", "where": "here", "hint": None, "exit_code": 3}
    assert ended.err == "error: it failed\n  here\n"


def test_verbose_shows_the_traceback(failing):
    assert "Traceback" not in failing(LlmoptError("it failed")).err
    assert "Traceback" in failing(LlmoptError("it failed"), "-v").err


def test_a_defect_is_one_line_and_how_to_see_more(failing):
    ended = failing(KeyError("oops"))
    assert ended.code == 1
    assert ended.err.splitlines() == [
        "internal error: KeyError: 'oops'",
        "hint: this is a defect of llmopt; run it again with -v for the traceback",
    ]


@pytest.mark.parametrize(
    ("error", "message", "where"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), "the disk is full", "out/x"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full", "I/O error"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "permission denied", "out"),
        (OSError(errno.EMFILE, "Too many open files", "x"), "too many open files", "x"),
        (OSError("cannot reach the hub\nsee there"), "cannot reach the hub", "see there"),
        (MemoryError(), "out of memory", None),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory", "DefaultCPUAllocator"),
        (
            ModuleNotFoundError("No module named 'vllm'", name="vllm"),
            "the Python package `vllm` is not installed",
            None,
        ),
    ],
)
def test_what_the_system_refuses_has_a_hint(failing, error, message, where):
    ended = failing(error)
    assert ended.code == 1
    assert ended.err.startswith(f"error: {message}\n")
    assert "hint: " in ended.err
    assert where is None or f"  {where}" in ended.err


def test_ctrl_c(failing):
    assert failing(KeyboardInterrupt()) == (130, "", "interrupted\n")


def child(body, **settings):
    """Start a process in which `work` stands in the place of the command."""
    program = textwrap.dedent(body) + (
        "\nimport sys\nimport llmopt.__main__ as entry\nentry._run = work\nsys.exit(entry.main([]))\n"
    )
    return subprocess.Popen([sys.executable, "-c", program], text=True, **settings)


WORK = """
    import time

    def work(arguments):
        try:
            print("ready", flush=True)
            for _ in range(600):
                time.sleep(0.1)
        finally:
            time.sleep(0.2)
            print("tidied", flush=True)
"""

SWALLOWING = """
    import time

    def work(arguments):
        try:
            print("ready", flush=True)
            for _ in range(600):
                time.sleep(0.1)
        except BaseException:
            raise RuntimeError("a library hid the signal")
        finally:
            print("tidied", flush=True)
"""


@pytest.mark.parametrize("body", [WORK, SWALLOWING])
@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_signals_unwind_the_stack(body, number, code, said):
    process = child(body, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (code, "tidied\n", f"{said}\n")


def test_a_second_sigterm_does_not_cut_the_tidying_short():
    process = child(WORK, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == ("tidied\n", "terminated\n")
    assert process.returncode == 143


FULL = Path("/dev/full")
PRINTS = """
    def work(arguments):
        print("x" * 100_000)
"""


def test_a_closed_pipe_is_no_news():
    read, write = os.pipe()
    os.close(read)
    process = child(PRINTS, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 1


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_stdout_on_a_full_disk():
    with FULL.open("w") as full:
        process = child(PRINTS, stdout=full, stderr=subprocess.PIPE)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert err.startswith("error: the disk is full\n")
    assert "Traceback" not in err
