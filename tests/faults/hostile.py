"""Hostile input: documents that were edited with intent, bytes that were not, and a bound on time and memory for each.

How many inputs a reader is given is set by LLMOPT_FUZZ_EXAMPLES.
"""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from llmopt.core.errors import LlmoptError
from llmopt.core.untrusted import UnreadableError

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"

EXAMPLES = int(os.environ.get("LLMOPT_FUZZ_EXAMPLES", "200"))
SECONDS = 10
"""What a single input may take; a busy machine is given time."""

MEMORY = 1 << 30
"""Address space that a reader may ask for beyond what the process has."""

_ROUND = 2000
"""Examples of one run of Hypothesis, which keeps all of them in mind."""

_SEEDS = st.integers(0, (1 << 64) - 1)
"""Hypothesis draws a number, and a generator of its own makes the input: fast enough for 100,000 of them."""

EDGES = (b"\xff" * 9, b"\0" * 8, b"[" * 2000, b'{"":' * 300, b"9" * 5000, b'"', b"\\ud800", b"\x80")
NUMBERS = [0, -1, 1, 2, 64, 255, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30, 10**400, -(1 << 63), 1.5, -0.0]
NUMBERS += [float("inf"), float("-inf"), float("nan"), 1e308, 5e-324]
TEXTS = [
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/../../b",
    "~",
    "C:\\x",
    "..\\x",
    "\0",
    "a\0b",
    "\ud800",
    "\x1b[2J",
    "%s{}",
]
TEXTS += [
    "x" * 5000,
    "\u202e",
    "model.safetensors",
    "llmopt.json",
    "-rf",
    "file:///etc/passwd",
    "NaN",
    "F32",
    "é" * 300,
]
SHAPES: list[Any] = [[], {}, [[]], [{}], {"": None}, None, True, False, [0] * 2000, {str(n): n for n in range(500)}]


def nested(depth: int) -> Any:
    """Return a list in a list in a list."""
    made: Any = []
    for _ in range(depth):
        made = [made]
    return made


def _hostile(dice: Random) -> Any:
    """Return a value that no writer of ours writes there."""
    kind = dice.randrange(10)
    if kind < 3:
        return dice.choice(NUMBERS)
    if kind < 6:
        return dice.choice(TEXTS)
    if kind < 8:
        return json.loads(json.dumps(dice.choice(SHAPES)))
    if kind < 9:
        return nested(dice.choice((40, 200, 900)))
    return "".join(chr(dice.choice((32, 127, 255, 0xD7FF, 0x10FFFF)) - dice.randrange(30)) for _ in range(5))


def edited(document: Any) -> Any:
    """Return copies of `document` with one to four values replaced, removed, doubled, moved or renamed."""

    def draw(number: int) -> Any:
        dice = Random(number)
        made = json.loads(json.dumps(document))
        for _ in range(dice.randint(1, 4)):
            made = _edit(dice, made)
        return made

    return _SEEDS.map(draw)


def _edit(dice: Random, document: Any) -> Any:
    places = list(_places(document))
    if not places:
        return _hostile(dice)
    holder, key = dice.choice(places)
    how = dice.choice(("value", "value", "value", "remove", "rename", "another", "add"))
    if how == "value":
        holder[key] = _hostile(dice)
    elif how == "remove":
        del holder[key]
    elif how == "another":
        other, place = dice.choice(places)
        holder[key] = json.loads(json.dumps(other[place]))
    elif isinstance(holder, list):
        holder.insert(key, _hostile(dice))
    else:
        holder[dice.choice(TEXTS)] = holder.pop(key) if how == "rename" else _hostile(dice)
    return document


def _places(document: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Yield (holder, key) of every value in a document, down to some depth."""
    if not isinstance(document, dict | list) or depth > 20:
        return
    for key, value in document.items() if isinstance(document, dict) else enumerate(document):
        yield document, key
        if isinstance(value, dict) or (isinstance(value, list) and len(value) < 100):
            yield from _places(value, depth + 1)


def damaged(data: bytes) -> Any:
    """Return copies of `data` with bytes flipped, cut out, doubled, put in or cut off."""

    def draw(number: int) -> bytes:
        dice = Random(number)
        made = bytearray(data)
        for _ in range(dice.randint(1, 5)):
            _damage(dice, made)
        return bytes(made)

    return _SEEDS.map(draw)


def _damage(dice: Random, made: bytearray) -> None:
    at, length = dice.randrange(len(made) + 1), dice.randint(1, 24)
    how = dice.choice(("flip", "flip", "put", "cut", "double", "end", "edge"))
    if how == "flip" and at < len(made):
        made[at] ^= 1 << dice.randrange(8)
    elif how == "put":
        made[at:at] = dice.randbytes(length)
    elif how == "cut":
        del made[at : at + length]
    elif how == "double":
        made[at:at] = made[at : at + length] * dice.choice((1, 2, 50))
    elif how == "end":
        del made[at:]
    elif how == "edge":
        made[at : at + length] = dice.choice(EDGES)


def as_json(document: Any) -> bytes:
    """Write a document as JSON, and what JSON cannot have as other writers do: NaN, half a surrogate pair."""
    return json.dumps(document).encode()


def hammer(inputs: Any, read: Any, *, accepts: tuple[type[Exception], ...] = ()) -> int:
    """Give a reader many inputs: it must return, or raise an error with a message, in bounded time and memory.

    Args:
        inputs: a Hypothesis strategy of one input.
        read: takes an input.
        accepts: further exceptions that the caller of the reader is meant to handle.

    Returns:
        How many inputs the reader refused.
    """
    refused = 0

    def one(given_input: Any) -> None:
        nonlocal refused
        with time_limit(SECONDS):
            try:
                read(given_input)
            except (LlmoptError, UnreadableError, *accepts) as error:
                refused += 1
                shown = str(error)
                assert shown, "an error without a message"
                assert len(shown) < 20_000, "a message of pages"

    with memory_limit(MEMORY):
        for start in range(0, EXAMPLES, _ROUND):
            run = settings(
                max_examples=min(_ROUND, EXAMPLES - start),
                database=None,
                deadline=None,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
            )(seed(start)(given(inputs)(one)))
            run()
    assert refused, "no input was refused: these are not hostile"
    return refused


@contextmanager
def time_limit(seconds: float) -> Any:
    """Raise TimeoutError in the main thread after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"an input took more than {seconds} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


@contextmanager
def memory_limit(nbytes: int) -> Any:
    """Let the process ask for no more than so many bytes of address space beyond what it has."""
    with open("/proc/self/statm") as file:  # noqa: PTH123  (no file of ours)
        has = int(file.read().split()[0]) * resource.getpagesize()
    former = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (has + nbytes, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, former)
