"""Every command of the tutorials is run, in order, on small models that stand for the reader's."""

import csv
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from families import LINES, save_sentence_folder

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
NOT_HERE = {"vllm", "hub"}
"""What a block may need that a machine with this repository and PyPI alone has not."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, what it needs, its lines."""

    language: str
    needs: str
    text: str


def blocks(page):
    """Return the fenced blocks of a page."""
    found = re.findall(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(*one) for one in found]


@pytest.fixture
def reader(tmp_path):
    """Return the folder in which a reader of the tutorials begins."""
    bundled = ROOT / "examples" / "tiny-llama"
    shutil.copytree(bundled, tmp_path / "my-llama")
    shutil.copy(bundled / "calibration.txt", tmp_path / "calibration.txt")
    shutil.copy(bundled / "heldout.txt", tmp_path / "test.txt")
    save_sentence_folder(tmp_path / "my-encoder")
    sentences = [f"{number} {LINES[number % 3]}"[: 20 + 7 * (number % 11)] for number in range(96)]
    (tmp_path / "texts.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    with (tmp_path / "pairs.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["sentence1", "sentence2", "score"])
        writer.writerows((sentences[at], sentences[(at * 7 + 3) % 96], at % 6) for at in range(48))
    return tmp_path


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_every_command_works(page, reader, resident_llmopt):
    """Recipes are written where their first line says, commands run in one shell, Python in another process."""
    environment = {
        **os.environ,
        "PATH": f"{resident_llmopt.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "LLMOPT_CACHE_DIR": str(reader / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    ran = 0
    for block in blocks(page):
        assert block.needs in {"", *NOT_HERE}
        if block.needs:
            continue
        if block.language == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", block.text)
            assert name is not None, "a recipe begins with its name"
            (reader / name[1]).write_text(block.text, encoding="utf-8")
            continue
        command = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[block.language]
        done = subprocess.run(
            [*command, block.text], cwd=reader, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{block.text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        ran += 1
    assert ran >= 4


def test_the_command_is_installed():
    command = [Path(sys.executable).with_name("llmopt"), "passes"]
    assert "gptq" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
