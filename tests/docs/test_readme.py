"""README: its commands are ones that the command line takes, and the Chinese one is in step with the English one."""

import re
import shlex
from pathlib import Path

import pytest
from llmopt.cli.app import COMMANDS, load

ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"


def headings(page):
    """Return the levels of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]


def code(page):
    """Return the lines of a page's code without comments, those that go on joined."""
    lines = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8")).splitlines()
    found, fenced = [], False
    for line in lines:
        fenced ^= line.startswith("```")
        if fenced or line.startswith("    "):
            found.append(re.sub(r"(^|\s+)# .*", "", line).strip())
    return [line for line in found if line]


def commands(page):
    """Return the calls of llmopt on a page, as words."""
    words = [shlex.split(line.partition(" > ")[0]) for line in code(page) if re.search(r"\bllmopt\s", line)]
    return [line[line.index("llmopt") + 1 :] for line in words if "llmopt" in line]


def test_headings_are_in_step():
    assert headings(ENGLISH) == headings(CHINESE)


def test_code_is_the_same():
    english, chinese = code(ENGLISH), code(CHINESE)
    layout = [line for line in english if re.match(r"\w+/\s{2,}", line)]
    assert len(layout) > 8, "the layout is told by folder"
    folders = [re.split(r"\s{2,}", line)[0] for line in layout]
    assert folders == [re.split(r"\s{2,}", line)[0] for line in chinese if re.match(r"\w+/\s{2,}", line)]
    assert [line for line in english if line not in layout] == [
        line for line in chinese if not re.match(r"\w+/\s{2,}", line)
    ]


def test_links_lead_somewhere():
    for page in (ENGLISH, CHINESE):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (ROOT / link).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("words", commands(ENGLISH), ids=" ".join)
def test_every_command_is_one_that_the_command_line_takes(words):
    name, *arguments = words
    assert name in COMMANDS
    load(name).make_context(name, arguments)


def test_every_command_is_told_of():
    told = {words[0] for words in commands(ENGLISH)} | set(re.findall(r"`llmopt (\w+)", ENGLISH.read_text()))
    assert set(COMMANDS) - told <= {"demo"}
