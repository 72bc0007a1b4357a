"""`llmopt adapt`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from ..core.errors import UsageError, nearest
from ..core.recipe import ModelSpec, Recipe, Step
from .building import Build, building, execute
from .common import ModelArgument

_ACTIONS = ("merge", "extract")
_MERGE, _EXTRACT = "Merge", "Extract"
_RANK = 16
_EXTRACTS = ("output", "force", "json", "quiet", "verbose")
"""The options of a build that `extract` heeds."""


@building("seed", "max_memory")
def command(
    action: Annotated[str, typer.Argument(metavar="merge|extract", help="What to do with adapters.")],
    model: ModelArgument,
    *,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            help="merge: a PEFT folder with LoRA, rsLoRA or DoRA in safetensors; several are added up.",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(
            metavar="X",
            help="merge: how much of each adapter, in their order. [default: 1 for each]",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="extract: the model that MODEL was made from.", rich_help_panel=_EXTRACT),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="N", help=f"extract: rank of the adapter. [default: {_RANK}]", min=1, rich_help_panel=_EXTRACT
        ),
    ] = None,
    build: Build,
) -> None:
    """Merge adapters into a model, or extract one from two models.

    `merge` adds adapters to the weights and exports the result. `extract` writes the difference of MODEL from --base as
    an adapter, by singular values: a folder that peft, vLLM and TGI load beside the base.

        llmopt adapt merge ./my-llama -o merged --adapter ./my-lora
        llmopt adapt extract ./tuned -o lora --base ./my-llama --rank 32
    """
    screen = build.screen()
    if action not in _ACTIONS:
        raise UsageError(
            f"unknown action `{action}`", where="expected merge or extract", hint=nearest(action, _ACTIONS)
        )
    if action == "merge":
        if not adapter:
            raise UsageError("no adapter to merge", hint="name it with --adapter DIR")
        if base is not None:
            raise UsageError("--base does not apply to merge", hint="MODEL is the base")
        if rank is not None:
            raise UsageError(
                "--rank does not apply to merge", hint="the adapters have the ranks they were trained with"
            )
        weights = {"weights": weight} if weight else {}
        recipe = Recipe(
            model=ModelSpec(id=model),
            passes=(Step("merge-adapter", {"adapters": adapter, **weights}),),
            exports=build.exports(),
            threads=build.threads,
        )
        execute(recipe, build, screen)
        return
    if base is None:
        raise UsageError("extract needs the base", hint="name the model that MODEL was made from with --base MODEL")
    if adapter or weight or replace(Build(), **{name: getattr(build, name) for name in _EXTRACTS}) != build:
        raise UsageError("extract takes --base and --rank only", hint="it writes a PEFT folder at once")
    if build.output is None:
        raise UsageError("no output folder given", hint="name one with -o DIR")
    from ..pipeline.adapters import extract_adapter
    from .render import Pairs

    report = extract_adapter(
        ModelSpec(id=model),
        ModelSpec(id=base),
        rank=rank or _RANK,
        output=build.output,
        force=build.force,
        reporter=screen.reporter,
    )
    shown = [
        ("folder", str(build.output)),
        ("layers", str(report["layers_count"])),
        ("rank", str(report["rank_count"])),
        ("left out", f"{report['error_max_ratio']:.2%} of a layer's difference at most"),
    ]
    screen.show([Pairs("Adapter", shown)], {"directory": str(build.output), **report}, summary=True)
