"""The table of commands. A command's module is imported when it is used, so that help costs next to nothing."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .help import Command, paragraphs, section, width

COMMANDS = {
    "quantize": "Quantize a model's weights and export it.",
    "prune": "Take layers, neurons, heads, tokens or single weights out of a model and export it.",
    "distill": "Let a model learn from a teacher and export it.",
    "adapt": "Merge adapters into a model, or extract one from two models.",
    "optimize": "Make a model's graph fast and export it.",
    "export": "Export a model without changing its weights.",
    "run": "Run a recipe.",
    "plan": "Show what a recipe will do, and refuse what cannot work.",
    "verify": "Check an artifact again: its files, its weights, its outputs.",
    "infer": "Compute embeddings, classes or text for a file of texts, or write down sounds.",
    "eval": "Measure how good a model or an artifact is at a task.",
    "bench": "Measure load time, speed and memory of a model or an artifact.",
    "report": "Write what is known of artifacts as a page or a model card.",
    "compare": "Show in what two artifacts differ.",
    "push": "Send an artifact to the Hugging Face hub.",
    "pull": "Fetch an artifact from the Hugging Face hub.",
    "inspect": "Show what a model or an artifact is made of.",
    "passes": "List the passes and exporters, or describe one.",
    "cache": "Show or remove the results of passes that are kept for later runs.",
    "doctor": "Show which runtimes and devices this machine has.",
    "schema": "Print the JSON Schema of recipes.",
    "demo": "Quantize the bundled model and compare it with the original.",
}
"""Name and effect. The first line of each command's docstring says the same; a test compares them."""


class _Commands(TyperGroup):
    """Commands that are imported when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """Import one command, None when there is none of that name."""
        return load(cmd_name) if cmd_name in COMMANDS else None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        columns = width()
        parts = [
            f"Usage: {ctx.command_path} COMMAND [OPTIONS]",
            paragraphs(self.help or "", columns),
            section("Commands", list(COMMANDS.items()), columns),
            section("Options", [("--version", "Show the version."), ("--help", "Show this help.")], columns),
            f"`{ctx.command_path} COMMAND --help` describes one of them.",
        ]
        formatter.write("\n\n".join(parts) + "\n")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmopt {import_module('llmopt').__version__}")
        raise typer.Exit


def _root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version)] = False,
) -> None:
    """Turn a transformer into an artifact that a real runtime loads: quantize, export, verify."""


def load(name: str) -> Any:
    """Import the module of one command and return the command."""
    module = import_module(f".{name}", __package__)
    return typer.main.get_command(_single(name, module.command))


def _single(name: str, function: Any) -> typer.Typer:
    single = _typer()
    single.command(name, cls=Command)(function)
    return single


def _typer(**settings: Any) -> typer.Typer:
    return typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, **settings)


def root() -> Any:
    """Return the command that holds all others."""
    app = _typer(cls=_Commands)
    app.callback()(_root)
    return typer.main.get_command(app)
