"""Whatever ends a command early becomes one message and one exit code."""

from __future__ import annotations

import errno
from difflib import get_close_matches
from typing import Any

import typer

from ..core.errors import LlmoptError, UsageError, is_disk_full, nearest
from ..core.untrusted import UnreadableError
from .app import COMMANDS

_ClickUsageError, _ClickException = typer.BadParameter.__mro__[1:3]
"""Typer carries its own copy of click in newer versions; its base classes are reached the same way in all of them."""

_ELSEWHERE = {
    "--asymmetric": ("asym",),
    "--calibration": ("calib-data", "dataset"),
    "--export": ("export-format", "format", "output-format"),
    "--ignore": ("exclude", "modules-to-not-convert"),
    "--length": ("max-seq-len", "max-seq-length", "seq-len", "seqlen"),
    "--method": ("algorithm", "quant-method"),
    "--samples": ("nsamples", "num-calibration-samples", "num-samples"),
    "--scheme": ("bits", "precision", "quantization", "w-bit", "wbits", "weight-format"),
    "--symmetric": ("sym",),
}
"""What options are called in other tools."""

_TOO_LARGE = ("file too large (os error 27)",)
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")


def understood(error: BaseException) -> LlmoptError | None:
    """Return the message for the user, None when the error is a defect of llmopt."""
    if isinstance(error, LlmoptError):
        # What an engine or a library could not do for want of space is no fault of the model.
        cause = error.__cause__
        return understood(cause) if cause is not None and _is_want_of_room(cause) else error
    if isinstance(error, UnreadableError):
        what = "a file is damaged" if error.path is None else f"`{error.path.name}` is damaged"
        return LlmoptError(what, where=f"{error.path or ''}\n{error}".strip(), hint="fetch or make it again")
    if isinstance(error, _ClickException):
        return _usage(error)
    if _is_want_of_room(error):
        return _want_of_room(error)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("llmopt"):
        package = error.name.partition(".")[0]
        return LlmoptError(f"the Python package `{package}` is not installed", hint=f"pip install {package}")
    if isinstance(error, OSError):
        return _system(error)
    return None


def _want_of_room(error: BaseException) -> LlmoptError:
    if _is_memory(error):
        hint = "see the estimate of --dry-run; use fewer or shorter calibration samples, or a machine with more memory"
        return LlmoptError("out of memory", where=_first_line(error), hint=hint)
    if is_disk_full(error):
        hint = "free some space, or write to another disk with -o"
        return LlmoptError("the disk is full", where=_place(error), hint=hint)
    hint = "raise the limit (`ulimit -f` shows it), or write to a file system that takes larger files with -o"
    return LlmoptError("a file became larger than is allowed", where=_place(error), hint=hint)


def _is_want_of_room(error: BaseException) -> bool:
    return _is_memory(error) or is_disk_full(error) or _is_too_large(error)


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or _mentions(error, _NO_MEMORY)


def _is_too_large(error: BaseException) -> bool:
    return getattr(error, "errno", None) == errno.EFBIG or _mentions(error, _TOO_LARGE)


def _mentions(error: BaseException, phrases: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return any(phrase in text for phrase in phrases)


def _system(error: OSError) -> LlmoptError:
    """Say what the operating system, or a library through an `OSError`, refused."""
    hint = "run it again with -v to see where this comes from"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        hint = "choose a folder that you may write, or change its permissions"
        return LlmoptError("permission denied", where=_place(error), hint=hint)
    if error.errno is None:
        what, _, rest = str(error).strip().partition("\n")
        return LlmoptError(what or type(error).__name__, where=rest.strip() or None, hint=hint)
    what = (error.strerror or type(error).__name__).lower()
    return LlmoptError(what, where=_place(error), hint=hint)


def _place(error: BaseException) -> str | None:
    names = [str(name) for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    return " -> ".join(names) or _first_line(error)


def _first_line(error: BaseException) -> str | None:
    return str(error).strip().partition("\n")[0] or None


def _usage(error: Any) -> UsageError:
    """Render an error of the option parser as one of ours."""
    ctx = getattr(error, "ctx", None)
    path = ctx.command_path if ctx is not None else "llmopt"
    help_hint = f"`{path} --help` lists the options"
    kind = type(error).__name__
    if kind == "NoSuchOption":
        return UsageError(
            f"unknown option {error.option_name}", hint=_nearest_option(error.option_name, ctx, help_hint)
        )
    if kind == "MissingParameter":
        return UsageError(f"missing {_parameter_name(error.param)}", hint=f"`{path} --help` shows how to call it")
    if kind == "BadParameter" and error.param is not None:
        return UsageError(f"bad value for {_parameter_name(error.param)}: {_sentence(error.message)}", hint=help_hint)
    text = _sentence(error.message)
    if text.startswith("no such command"):
        name = error.message.split("'")[1]
        return UsageError(f"unknown command `{name}`", hint=nearest(name, COMMANDS))
    if text == "missing command":
        return UsageError("no command given", hint="`llmopt --help` lists the commands")
    if text.startswith("got unexpected extra argument"):
        rest = text.partition("(")[2].removeprefix("s) (").rstrip(")")
        return UsageError(f"unexpected argument {rest}", hint=help_hint)
    return UsageError(text, hint=help_hint)


def _nearest_option(name: str, ctx: Any, fallback: str) -> str:
    if ctx is None:
        return fallback
    options = {option for param in ctx.command.get_params(ctx) for option in (*param.opts, *param.secondary_opts)}
    words = {option[2:]: option for option in options if option.startswith("--")}
    words |= {word: option for option, others in _ELSEWHERE.items() if option in options for word in others}
    # Without the dashes, which are alike in all.
    close = get_close_matches(name.strip("-"), words, n=1, cutoff=0.65)
    return f"did you mean `{words[close[0]]}`?" if close else fallback


def _parameter_name(param: Any) -> str:
    if param.param_type_name == "argument":
        return param.metavar or param.name.upper()
    return max(param.opts, key=len)


def _sentence(message: str) -> str:
    text = message.strip().rstrip(".")
    return text[:1].lower() + text[1:]
