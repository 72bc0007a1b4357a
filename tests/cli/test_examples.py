"""The example pipelines: they parse, and what they call is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from llmopt.cli.app import COMMANDS, root

ROOT = Path(__file__).parents[2]
FILES = ("examples/github-actions.yml", "examples/gitlab-ci.yml", "examples/pre-commit-config.yaml")
FILES += (".pre-commit-hooks.yaml", "examples/Makefile")
BUILDS = ("quantize", "prune", "distill", "adapt", "optimize", "export", "run")


def lines(file: str) -> list[str]:
    """Return the command lines of a file that call llmopt."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if file.endswith("Makefile"):
        text = text.replace("\\\n", " ").replace("$(LLMOPT)", "llmopt")
        text = text.replace("$(FLAGS)", "--quiet --if-changed --force")
        return [line.strip() for line in text.splitlines() if line.startswith("\tllmopt ")]
    every = [line for value in strings(yaml.safe_load(text)) for line in value.splitlines()]
    return [line for line in every if line.startswith("llmopt ")]


def strings(document: Any) -> list[str]:
    if isinstance(document, str):
        return [document]
    values = document.values() if isinstance(document, dict) else document if isinstance(document, list) else ()
    return [text for value in values for text in strings(value)]


@pytest.mark.parametrize("file", FILES)
def test_what_an_example_calls_is_there(file: str):
    found = lines(file)
    assert found
    for line in found:
        name, *arguments = shlex.split(re.sub(r"\$[({][^)}]*[)}]+", "X", line))[1:]
        assert name in COMMANDS, line
        command: Any = root().get_command(None, name)  # pyright: ignore[reportArgumentType]
        known = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
        for argument in arguments:
            assert not argument.startswith("-") or argument in known, f"{line}: {argument}"


@pytest.mark.parametrize("name", BUILDS)
def test_every_build_has_the_options_of_make(name: str):
    command: Any = root().get_command(None, name)  # pyright: ignore[reportArgumentType]
    assert {"--depfile", "--if-changed"} <= {option for one in command.params for option in one.opts}


def test_the_github_workflow_is_one():
    document = yaml.safe_load((ROOT / FILES[0]).read_text(encoding="utf-8"))
    assert {"push", "pull_request"} == set(document[True])  # YAML 1.1 reads `on` as true
    for job in document["jobs"].values():
        assert job["runs-on"]
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])


def test_the_gitlab_pipeline_is_one():
    document = yaml.safe_load((ROOT / FILES[1]).read_text(encoding="utf-8"))
    jobs = {name: job for name, job in document.items() if isinstance(job, dict) and "script" in job}
    assert {job["stage"] for job in jobs.values()} == set(document["stages"])


def test_the_hook_is_the_same_in_both_files():
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    (own,) = yaml.safe_load((ROOT / FILES[2]).read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert {key: hook[key] for key in ("id", "entry", "files")} == {key: own[key] for key in ("id", "entry", "files")}
