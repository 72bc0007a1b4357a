"""The help of every command, compared with a golden file. `UPDATE_GOLDEN=1 pytest tests/cli` writes them anew."""

import os
from pathlib import Path

import pytest
from llmopt.cli.app import COMMANDS, load

GOLDEN = Path(__file__).parent / "golden"


def compare(name, text):
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(llmopt, name):
    ended = llmopt(name, "--help")
    assert (ended.code, ended.err) == (0, "")
    compare(name, ended.out)


def test_help_of_the_whole(llmopt):
    ended = llmopt("--help")
    assert ended.code == 0
    compare("llmopt", ended.out)
    assert llmopt().out == ended.out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_says_what_the_docstring_says(name):
    assert load(name).help.partition("\n\n")[0] == COMMANDS[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_parameter_is_described(name):
    for parameter in load(name).params:
        assert (parameter.help or "").rstrip("]").endswith((".", "yes", "no")) or "[" in parameter.help, parameter.name


@pytest.mark.parametrize("width", [40, 80, 200])
def test_help_fits_the_terminal(llmopt, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = llmopt("quantize", "--help").out.splitlines()
    prose = [line for line in lines if not line.startswith("    llmopt ") and " --" not in line[:10]]
    assert max(map(len, prose)) <= max(width, 60)


def test_version(llmopt):
    from llmopt import __version__

    assert llmopt("--version").out == f"llmopt {__version__}\n"
