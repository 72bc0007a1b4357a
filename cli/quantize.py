"""`llmopt quantize`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..core.errors import UsageError
from ..core.passes import Need
from ..core.recipe import CalibrationSpec, ModelSpec, Recipe, Step
from ..passes import PASSES
from .building import Build, building, execute
from .common import CALIBRATION_PANEL, Calibration, ModelArgument, check_choice
from .options import Options, Source, refuse_foreign, with_options
from .schemes import Scheme, parse_scheme

METHODS = ("autoround", "awq", "gptq", "hqq", "rtn")
ALLOCATION = "allocate-bits"
ACTIVATIONS = "quantize-activations"
CACHE = "quantize-kv"
_QUANTIZATION, _MODEL = "Quantization", "Model"
_MIXED = "Mixed precision"
_ACTIVATIONS = "Activations"


def _method_source(name: str) -> Source:
    # Bits and numbers come from --scheme, and scales alone quantize nothing.
    left_out = frozenset({"bits", "number", "scales_only"})
    return Source(name, PASSES.load(name).Params, left_out, _QUANTIZATION, always=False)


@with_options(
    *(_method_source(name) for name in METHODS),
    Source(ALLOCATION, PASSES.load(ALLOCATION).Params, panel=_MIXED),
    Source(
        ACTIVATIONS,
        PASSES.load(ACTIVATIONS).Params,
        # Inputs are rounded of the layers whose weights are, and --symmetric and --ignore speak of weights.
        frozenset({"number", "scale", "symmetric", "ignore"}),
        _ACTIVATIONS,
    ),
    Source("calibration", CalibrationSpec, frozenset({"data"}), CALIBRATION_PANEL),
    Source("model", ModelSpec, frozenset({"id"}), _MODEL),
)
@building()
def command(
    model: ModelArgument,
    *,
    scheme: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Bits of a weight and of an activation, 16 being floating point: w2a16 to w8a16, w4a8, w4a8-fp8, "
            "w8a8-int8, w8a8-fp8; or a format of weights alone: fp8, nvfp4, mxfp4. [default: w4a16]",
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
    calibration: Calibration = None,
    activations: Annotated[
        str | None,
        typer.Option(
            metavar="token|tensor",
            help="Where a scheme has 8-bit activations: a scale for each token, found while the model runs, or one for "
            "the tensor, fixed by --calibration. [default: token]",
            rich_help_panel=_ACTIVATIONS,
        ),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            metavar="fp8|int8",
            help="Keep keys and values in 8 bits, with scales found by --calibration.",
            rich_help_panel=_ACTIVATIONS,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="float32|float16|bfloat16",
            help="Store what is not quantized, and scales, in this dtype. [default: the model's]",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = None,
    build: Build,
    options: Options,
) -> None:
    """Quantize a model's weights and export it.

    The weights become integers or small floating-point numbers with scales; activations are rounded where the scheme
    says so. Each artifact is opened again in the runtime it is for and compared with the quantized model; an artifact
    that is not the model is no result (exit 3). One export is written into DIR itself, several into DIR/EXPORT/.

        llmopt quantize ./my-llama -o my-llama-int4 --calibration wiki.txt --export onnx-genai
    """
    screen = build.screen()
    found = parse_scheme(scheme)
    for option, value, choices in (
        ("--activations", activations, ("token", "tensor")),
        ("--kv-cache", kv_cache, ("fp8", "int8")),
        ("--dtype", dtype, ("float32", "float16", "bfloat16")),
    ):
        check_choice(option, value, choices)
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
            *(() if dtype is None else (Step("cast", {"dtype": dtype}),)),
            *_allocation(options[ALLOCATION], calibrated=calibration is not None),
            Step(chosen, {**found.weights, **options[chosen]}),
            *_activations(scheme, found, activations, options[ACTIVATIONS]),
            *(() if kv_cache is None else (Step(CACHE, {"number": kv_cache}),)),
        ),
        exports=build.exports(),
        seed=build.seed,
        threads=build.threads,
    )
    execute(recipe, build, screen, notes=() if method or calibration else (hint,))


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


def _activations(scheme: str, found: Scheme, scale: str | None, given: dict[str, Any]) -> tuple[Step, ...]:
    """Return the pass that rounds activations, if the scheme has one.

    Raises:
        UsageError: something is asked of activations, and the scheme leaves them in floating point.
    """
    if found.inputs is None:
        asked = ["activations"] if scale is not None else [name.replace("_", "-") for name in given]
        if asked:
            raise UsageError(
                f"--{asked[0]} does not apply to --scheme {scheme}",
                where="its activations stay in floating point",
                hint="use --scheme w8a8-int8, w8a8-fp8, w4a8 or w4a8-fp8",
            )
        return ()
    return (Step(ACTIVATIONS, {**found.inputs, **({} if scale is None else {"scale": scale}), **given}),)


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
