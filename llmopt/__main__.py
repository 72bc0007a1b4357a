"""The command `llmopt`: runs one command and turns whatever ends it into a message and an exit code."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from .watchman import Watchman

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

_ECHO_SECONDS = 2.0
_interrupted: list[float] = []
"""When Ctrl-C was pressed."""

_received: list[int] = []
"""Signals so far. A library may swallow the exception that a signal raises; this list tells us all the same."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed.

    A class of its own: the interpreter notes a plain `KeyboardInterrupt` that passes through code made from a string
    (`exec`, as in dataclasses), and under `-m` ends itself by the signal afterwards, whatever status we return.
    """


class Terminated(BaseException):
    """SIGTERM arrived: unwind the stack, so that whatever is half done is tidied up."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _received.clear()
    _interrupted.clear()
    as_json = _has(given, "--json")
    watchman = _prepare(as_json=as_json)
    try:
        status = _run(given)
    except BaseException as error:  # noqa: BLE001 -- the one boundary: nothing may end in a traceback unasked
        status = _report(error, verbose=_has(given, "-v", "--verbose"), as_json=as_json)
    if watchman is not None:
        watchman.dismiss()
    if _received and watchman is not None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)  # the interpreter would take seconds to take the libraries down; all is tidied and told
    return status


def _prepare(*, as_json: bool) -> Watchman | None:
    """Catch signals, never fail over a character that the terminal cannot show, and set what libraries read later."""
    # The million objects that importing torch and transformers makes all stay: looking through them after every 700
    # new ones takes a sixth of the time.
    gc.set_threshold(10_000, 10, 10)
    # Read by torch at its first allocation: with huge pages, fresh memory for a weight costs a quarter of the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Read by numpy when it is imported: as in core/threads.py, the number must not depend on the machine.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    try:
        signal.signal(signal.SIGTERM, _terminate)
        signal.signal(signal.SIGINT, _interrupt)
    except ValueError:  # not in the main thread: someone else owns the signals
        return None
    # Windows takes sockets alone there, and has no SIGTERM.
    return None if os.name == "nt" else Watchman(lambda number: _ended_by(number, as_json=as_json))


def _terminate(number: int, _frame: FrameType | None) -> None:
    # `timeout` and process managers may send it twice; the second must not cut the tidying short.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _received.append(number)
    raise Terminated


def _interrupt(number: int, _frame: FrameType | None) -> None:
    # Wrappers such as `uv run` pass it on beside the terminal's own: an echo must not cut the tidying short.
    now = time.monotonic()
    echo = bool(_interrupted) and now - _interrupted[-1] < _ECHO_SECONDS
    _interrupted.append(now)
    _received.append(number)
    if not echo:
        raise Interrupted


def _run(arguments: list[str]) -> int:
    import typer

    from .cli.app import root

    command = root()
    try:
        with command.make_context("llmopt", arguments or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as ended:
        status = ended.exit_code
    else:
        status = 0
    sys.stdout.flush()  # here, so that a full disk or a closed pipe is met while it can still be told
    return status


def _report(error: BaseException, *, verbose: bool, as_json: bool) -> int:
    """Tell the user and return the exit status."""
    from .core.errors import ExitCode

    if verbose:
        import traceback

        traceback.print_exception(error)
    if _received:
        with suppress(ValueError):  # the interpreter's own end is not to be interrupted
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    if signal.SIGTERM in _received or isinstance(error, Terminated):
        return _ended_by(signal.SIGTERM, as_json=as_json)
    if signal.SIGINT in _received or isinstance(error, KeyboardInterrupt):
        return _ended_by(signal.SIGINT, as_json=as_json)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else ExitCode.FAILED
    if isinstance(error, BrokenPipeError):
        _drop_stdout()
        return ExitCode.FAILED
    from .cli.annotations import annotate
    from .cli.failures import understood

    known = understood(error)
    if known is not None:
        _write(str(known), known.to_dict() if as_json else None)
        annotate(known)
        return known.exit_code
    summary = f"internal error: {type(error).__name__}: {error}".strip().partition("\n")[0]
    hint = "this is a defect of llmopt" + ("" if verbose else "; run it again with -v for the traceback")
    document = {"error": summary, "where": None, "hint": hint, "exit_code": int(ExitCode.FAILED)}
    _write(f"{summary}\nhint: {hint}", document if as_json else None)
    return ExitCode.FAILED


def _ended_by(number: int, *, as_json: bool) -> int:
    """Tell the user of a signal and return the exit status."""
    # ExitCode has them too; here nothing may be imported any more: the main thread may be in the midst of it.
    text, status = ("terminated", 143) if number == signal.SIGTERM else ("interrupted", 130)
    _write(text, {"error": text, "where": None, "hint": None, "exit_code": status} if as_json else None)
    return status


def _write(text: str, document: dict[str, object] | None) -> None:
    """Print the message on stderr, and the document on stdout when JSON was asked for."""
    try:
        print(text, file=sys.stderr, flush=True)
        if document is not None:
            import json

            print(json.dumps(document, indent=2), flush=True)
    except OSError:
        _drop_stdout()


def _drop_stdout() -> None:
    """Nobody reads stdout any more: keep the interpreter from failing over it at its end."""
    with suppress(OSError, ValueError):  # under a test stdout may be no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _has(arguments: list[str], *names: str) -> bool:
    """Return whether an option was given; asked when parsing itself may have failed."""
    return any(name in arguments for name in names)


if __name__ == "__main__":
    sys.exit(main())
