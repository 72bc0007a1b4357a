"""`llmopt quantize`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..core.errors import UsageError
from ..core.passes import Need
from ..core.recipe import CalibrationSpec, ModelSpec, Recipe, Step
from ..passes import PASSES
from .build import DEFAULT_EXPORT, execute, exports, parse_scheme
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
from .options import Options, Source, refuse_foreign, with_options

METHODS = ("autoround", "awq", "gptq", "hqq", "rtn")
ALLOCATION = "allocate-bits"
_QUANTIZATION, _CALIBRATION, _MODEL = "Quantization", "Calibration", "Model"
_MIXED = "Mixed precision"


def _method_source(name: str) -> Source:
    # The bits come from --scheme, and scales alone quantize nothing.
    return Source(name, PASSES.load(name).Params, frozenset({"bits", "scales_only"}), _QUANTIZATION, always=False)


@with_options(
    *(_method_source(name) for name in METHODS),
    Source(ALLOCATION, PASSES.load(ALLOCATION).Params, panel=_MIXED),
    Source("calibration", CalibrationSpec, frozenset({"data"}), _CALIBRATION),
    Source("model", ModelSpec, frozenset({"id"}), _MODEL),
)
def command(
    model: ModelArgument,
    *,
    output: Output = None,
    scheme: Annotated[
        str,
        typer.Option(
            metavar="wBITSa16",
            help="Bits of a weight and of an activation, where 16 stands for floating point. [default: w4a16]",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = "w4a16",
    method: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(METHODS),
            help="How codes are chosen: rtn rounds each weight to the nearest, hqq fits the scales to them. With "
            "--calibration, awq scales the inputs that matter most, gptq makes up for the error of one weight with "
            "the next, autoround learns from each block's output which way to round. [default: gptq with "
            "--calibration, else rtn]",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Text that the model will see much of: a .txt, .jsonl, .csv or .parquet file, or "
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
    """Quantize a model's weights and export it.

    The weights become integers with scales. Each artifact is opened again in the runtime it is for and compared with
    the quantized model; an artifact that is not the model is no result (exit 3). One export is written into DIR itself,
    several into DIR/EXPORT/.

        llmopt quantize ./my-llama -o my-llama-int4 --calibration wiki.txt --export onnx-genai
    """
    screen = open_screen(json=json, quiet=quiet, verbose=verbose)
    bits = parse_scheme(scheme)
    chosen = _choose(method, calibrated=calibration is not None)
    refuse_foreign(options, chosen, METHODS, kind="--method")
    if calibration is None and options["calibration"]:
        name = next(iter(options["calibration"])).replace("_", "-")
        raise UsageError(f"--{name} needs calibration data", hint="name it with --calibration SPEC")
    hint = "no --calibration: rounding to nearest; with calibration data gptq loses less"
    recipe = Recipe(
        model=ModelSpec(id=model, **options["model"]),
        calibration=None if calibration is None else CalibrationSpec(data=calibration, **options["calibration"]),
        passes=(
            *_allocation(options[ALLOCATION], calibrated=calibration is not None),
            Step(chosen, {"bits": bits, **options[chosen]}),
        ),
        exports=exports(export or [DEFAULT_EXPORT]),
        seed=seed,
    )
    execute(
        recipe,
        output,
        screen,
        dry_run=dry_run,
        save_recipe=save_recipe,
        force=force,
        max_memory=max_memory,
        notes=() if method or calibration else (hint,),
    )


def _allocation(given: dict[str, Any], *, calibrated: bool) -> tuple[Step, ...]:
    """Return the pass that chooses bits under a budget, if one was asked for.

    Raises:
        UsageError: no budget, or no calibration data.
    """
    if not given:
        return ()
    if "budget" not in given:
        raise UsageError(
            f"--{next(iter(given)).replace('_', '-')} needs a budget", hint="name it with --budget, such as 4.5bpw"
        )
    if not calibrated:
        raise UsageError("--budget needs calibration data", hint="name it with --calibration SPEC")
    return (Step(ALLOCATION, given),)


def _choose(method: str | None, *, calibrated: bool) -> str:
    """Return the method.

    Raises:
        UsageError: an unknown one, or one that needs calibration data and has none.
    """
    if method is None:
        return "gptq" if calibrated else "rtn"
    if method not in METHODS:
        raise UsageError(f"unknown method `{method}`", hint=f"known: {', '.join(METHODS)}")
    if Need.CALIBRATION in PASSES.load(method).needs and not calibrated:
        raise UsageError(
            f"--method {method} needs calibration data", hint="name it with --calibration SPEC, or use rtn"
        )
    return method
