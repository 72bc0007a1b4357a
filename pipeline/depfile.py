"""What was read for an artifact, in the words of make and ninja."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..core.errors import UsageError


def write_depfile(path: Path, target: Path, inputs: Iterable[Path]) -> None:
    """Write a rule that says what a file was made from, for make's `include` and ninja's `depfile`.

    Raises:
        UsageError: it cannot be written, or a name holds a line break.
    """
    # make takes a first name with `=` for a variable of the target.
    inputs = sorted(inputs, key=lambda name: "=" in str(name))
    for name in (target, *inputs):
        if set("\n;") & set(str(name)) or (inputs and name == inputs[0] and "=" in str(name)):
            hint = "give it by a name without it: a link, or a path from another folder"
            raise UsageError(f"make has no word for the name {str(name)!r}", hint=hint)
    text = f"{_escaped(target)}:" + "".join(f" \\\n  {_escaped(name)}" for name in inputs) + "\n"
    try:
        handle, made = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            Path(made).chmod(0o644)
            Path(made).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(made).unlink()
            raise
    except OSError as error:
        hint = "give the name of a file, in a folder that exists, with --depfile"
        raise UsageError(f"cannot write the depfile to `{path}`", where=error.strerror, hint=hint) from None


def _escaped(name: Path) -> str:
    r"""Return a file name as make and ninja read it: `\ ` for a blank, `\#`, `$$`; backslashes before one are two."""
    made: list[str] = []
    for letter in str(name):
        if letter in " #\t:":
            before = "".join(made)
            slashes = len(before) - len(before.rstrip("\\"))
            made += ["\\"] * (slashes + 1) + [letter]
        else:
            made.append("$$" if letter == "$" else letter)
    return "".join(made)
