"""A shell that checks refusals, and ways to damage a model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from llmopt.__main__ import main

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Shell:
    """Runs command lines in the current folder, in this process.

    Args:
        folder: the current folder.
        former: an artifact that a refused command must not touch.
        capture: pytest's capture.
    """

    def __init__(self, folder: Path, former: Path, capture: Any) -> None:
        self.folder = folder
        self._former = former
        self._capture = capture

    def run(self, *arguments: Any) -> Ended:
        """Run one command line, and leave this process as it was."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        environment = dict(os.environ)
        self._capture.readouterr()
        try:
            with warnings.catch_warnings():
                code = main([str(argument) for argument in arguments])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.environ.clear()
            os.environ.update(environment)
        return Ended(code, *self._capture.readouterr())

    def refuses(self, *arguments: Any, code: int, what: str, hint: str, where: str = "") -> Ended:
        """Run a command that must end with an error and change nothing."""
        before = tree(self.folder)
        ended = self.run(*arguments)
        check_message(ended, code=code, what=what, hint=hint, where=where)
        assert tree(self.folder) == before
        return ended

    def builds_nothing(self, *arguments: Any, **expected: Any) -> Ended:
        """Run a command with `-o out` that must fail: without an output, and with a former one to be replaced."""
        assert not (self.folder / "out").exists()
        ended = self.refuses(*arguments, "-o", "out", **expected)
        shutil.copytree(self._former, self.folder / "out")
        again = self.refuses(*arguments, "-o", "out", "--force", "--json", **expected)
        document = json.loads(again.out)
        assert set(document) == {"error", "where", "hint", "exit_code"}
        assert f"error: {document['error']}" in again.err
        assert document["exit_code"] == again.code
        shutil.rmtree(self.folder / "out")
        return ended


def check_message(ended: Ended, *, code: int, what: str, hint: str, where: str = "") -> None:
    """Check one message: `error: WHAT`, indented lines with `where` among them, `hint: HINT`; notes may come before."""
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    assert "internal error" not in ended.err
    lines = ended.err.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("error: "))
    assert what in lines[start], ended.err
    assert not any(line.startswith("error: ") for line in lines[start + 1 :]), ended.err
    assert lines[-1].startswith("hint: "), ended.err
    assert hint in lines[-1], ended.err
    between = lines[start + 1 : -1]
    assert all(line.startswith("  ") for line in between), ended.err
    assert where in "\n".join(between), ended.err


def tree(folder: Path) -> dict[str, str]:
    """Return every path below `folder`, with the hash of what it holds."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def copy_tiny(folder: Path) -> Path:
    """Copy the bundled model, without its texts."""
    return Path(shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.txt")))


# Ways to damage a model


def reconfigure(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; `...` removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def retensor(folder: Path, change: Any) -> None:
    """Let `change` alter the dict of tensors."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def reheader(folder: Path, change: Any) -> None:
    """Let `change` alter the header and leave the data as it is."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def zeros(*shape: int) -> Any:
    """Return a tensor of zeros."""
    import torch

    return torch.zeros(shape)
