"""`llmopt optimize`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..core.errors import UsageError, nearest
from ..core.recipe import CalibrationSpec, ModelSpec, Recipe, Step
from ..passes import PASSES
from .build import execute, exports
from .common import (
    DryRun,
    Export,
    Force,
    Json,
    MaxMemory,
    ModelArgument,
    Output,
    Quiet,
    SaveRecipe,
    Seed,
    Verbose,
    open_screen,
)
from .options import Options, Source, with_options

_GRAPH, _CALIBRATION = "Graph", "Calibration"
_INT8 = ("dynamic", "static")
_EMBEDDINGS = {"products": "none", "embeddings": 8, "group_size": 128, "max_drop": 0.01, "required": False}
"""What `quantize-weights` does beside products in 8 bits."""


@with_options(
    Source("remove-padding", PASSES.load("remove-padding").Params, frozenset({"required"}), _GRAPH),
    Source("quantize-static", PASSES.load("quantize-static").Params, panel=_GRAPH),
    Source("calibration", CalibrationSpec, frozenset({"data"}), _CALIBRATION),
    Source("model", ModelSpec, frozenset({"id"}), "Model"),
)
def command(
    model: ModelArgument,
    *,
    output: Output = None,
    remove_padding: Annotated[
        bool | None,
        typer.Option(
            "--remove-padding/--no-remove-padding",
            help="Let an encoder compute its tokens, not the rectangle that a batch is padded to. [default: where the "
            "model is an encoder]",
            rich_help_panel=_GRAPH,
        ),
    ] = None,
    int8: Annotated[
        str | None,
        typer.Option(
            metavar="dynamic|static",
            help="Multiply in 8 bits, and store embeddings so: static has fixed ranges, found by --calibration, and is "
            "faster; dynamic finds the range of each token as the model runs.",
            rich_help_panel=_GRAPH,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Text like that which the model will see: a .txt, .jsonl, .csv or .parquet file, or "
            "hf:NAME[/CONFIG][:SPLIT].",
            rich_help_panel=_CALIBRATION,
        ),
    ] = None,
    export: Export = None,
    seed: Seed = 0,
    dry_run: DryRun = False,
    save_recipe: SaveRecipe = None,
    force: Force = False,
    max_memory: MaxMemory = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: Options,
) -> None:
    """Make a model's graph fast on a CPU and export it.

    Padding is removed from encoders, operators are fused, and with --int8 products are computed in 8 bits. The artifact
    is opened again in its runtime and compared with the model.

        llmopt optimize ./my-encoder -o my-encoder-int8 --int8 static --calibration texts.txt
    """
    screen = open_screen(json=json, quiet=quiet, verbose=verbose)
    if int8 is not None and int8 not in _INT8:
        raise UsageError(f"bad value for --int8: {int8}", where="expected dynamic or static", hint=nearest(int8, _INT8))
    if int8 == "static" and calibration is None:
        raise UsageError(
            "--int8 static needs calibration data", hint="name it with --calibration SPEC, or use --int8 dynamic"
        )
    _refuse_idle(options, int8=int8, calibrated=calibration is not None, packs=remove_padding is not False)
    passes: list[Step] = []
    if remove_padding is not False:
        required = {} if remove_padding else {"required": False}
        passes.append(Step("remove-padding", {**options["remove-padding"], **required}))
    passes.append(Step("fuse"))
    if int8 is not None:
        passes += [Step(f"quantize-{int8}", options["quantize-static"]), Step("quantize-weights", _EMBEDDINGS)]
    recipe = Recipe(
        model=ModelSpec(id=model, **options["model"]),
        calibration=None if calibration is None else CalibrationSpec(data=calibration, **options["calibration"]),
        passes=tuple(passes),
        exports=exports(export or ["onnx"]),
        seed=seed,
    )
    execute(recipe, output, screen, dry_run=dry_run, save_recipe=save_recipe, force=force, max_memory=max_memory)


def _refuse_idle(options: Options, *, int8: str | None, calibrated: bool, packs: bool) -> None:
    """Refuse options that would do nothing.

    Raises:
        UsageError: it names what they need.
    """
    static = {"observer", "percentile"} & set(options["quantize-static"])
    for given, idle, needs in (
        (options["calibration"], not calibrated, "--calibration SPEC"),
        (options["remove-padding"], not packs, "padding to be removed: leave --no-remove-padding out"),
        (options["quantize-static"], int8 is None, "--int8 dynamic or --int8 static"),
        (static, int8 == "dynamic", "--int8 static"),
    ):
        if given and idle:
            raise UsageError(f"--{min(given).replace('_', '-')} needs {needs}")
