"""`llmopt optimize`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..core.errors import UsageError
from ..core.recipe import CalibrationSpec, ModelSpec, Recipe, Step
from ..passes import PASSES
from .building import Build, building, execute
from .common import CALIBRATION_PANEL, Calibration, ModelArgument, check_choice
from .options import Options, Source, with_options

_GRAPH = "Graph"
_INT8, _TARGETS = ("dynamic", "static"), ("cpu", "gpu", "edge")
_EMBEDDINGS = {"products": "none", "embeddings": 8, "max_drop": 0.01, "required": False}
"""What `quantize-weights` does beside products in 8 bits."""


@with_options(
    Source("remove-padding", PASSES.load("remove-padding").Params, frozenset({"required"}), _GRAPH),
    Source("quantize-static", PASSES.load("quantize-static").Params, panel=_GRAPH),
    Source("fix-shapes", PASSES.load("fix-shapes").Params, frozenset({"axes"}), _GRAPH),
    Source("calibration", CalibrationSpec, frozenset({"data"}), CALIBRATION_PANEL),
    Source("model", ModelSpec, frozenset({"id"}), "Model"),
)
@building()
def command(
    model: ModelArgument,
    *,
    target: Annotated[
        str,
        typer.Option(
            metavar="cpu|gpu|edge",
            help="Where it will run. gpu: float16, and the operators that are known to have CUDA kernels. edge: "
            "standard operators alone, products in 8 bits with fixed ranges, found by --calibration.",
            rich_help_panel=_GRAPH,
        ),
    ] = "cpu",
    remove_padding: Annotated[
        bool | None,
        typer.Option(
            "--remove-padding/--no-remove-padding",
            help="Let an encoder compute its tokens, not the rectangle that a batch is padded to. [default: where the "
            "model is an encoder, and the target a CPU]",
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
    calibration: Calibration = None,
    build: Build,
    options: Options,
) -> None:
    """Make a model's graph fast and export it.

    For a CPU padding is removed from encoders, operators are fused, and with --int8 products are computed in 8 bits;
    --target chooses other steps for a GPU or for small devices. The artifact is opened again in its runtime, on the
    CPU, and compared with the model.

        llmopt optimize ./my-encoder -o my-encoder-int8 --int8 static --calibration texts.txt
    """
    screen = build.screen()
    check_choice("--target", target, _TARGETS)
    if int8 is not None:
        check_choice("--int8", int8, _INT8)
    packs = target == "cpu" if remove_padding is None else remove_padding
    if target == "edge" and int8 is None:
        int8 = "static"
    _refuse(options, target=target, int8=int8, calibrated=calibration is not None, packs=packs)
    passes: list[Step] = []
    if packs:
        required = {} if remove_padding else {"required": False}
        passes.append(Step("remove-padding", {**options["remove-padding"], **required}))
    passes += _steps(target, int8, options)
    recipe = Recipe(
        model=ModelSpec(id=model, **options["model"]),
        calibration=None if calibration is None else CalibrationSpec(data=calibration, **options["calibration"]),
        passes=tuple(passes),
        exports=build.exports("onnx"),
        seed=build.seed,
        threads=build.threads,
    )
    execute(recipe, build, screen)


def _steps(target: str, int8: str | None, options: Options) -> list[Step]:
    """Return the passes for a target, behind the removal of padding."""
    if target == "edge":
        steps = [Step("fold"), Step("simplify")]
    else:
        steps = [Step("fuse", {} if target == "cpu" else {"target": target})]
    if target == "gpu":
        steps.append(Step("cast-fp16"))
    if int8 is not None:
        standard = {} if target == "cpu" else {"operators": "standard"}
        embeddings = Step("quantize-weights", {**_EMBEDDINGS, **standard})
        steps += [Step(f"quantize-{int8}", options["quantize-static"]), embeddings]
    return [*steps, Step("fix-shapes", options["fix-shapes"])] if options["fix-shapes"] else steps


def _refuse(options: Options, *, target: str, int8: str | None, calibrated: bool, packs: bool) -> None:
    """Refuse what lacks something, and options that would do nothing.

    Raises:
        UsageError: it names what they need.
    """
    if target == "gpu" and int8 is not None:
        raise UsageError(
            f"--int8 {int8} is for processors", where="--target gpu computes in float16", hint="leave one of them out"
        )
    if int8 == "static" and not calibrated:
        asked = "--target edge" if target == "edge" else "--int8 static"
        raise UsageError(
            f"{asked} needs calibration data", hint="name it with --calibration SPEC, or use --int8 dynamic"
        )
    static = {"observer", "percentile"} & set(options["quantize-static"])
    for given, idle, needs in (
        (options["calibration"], not calibrated, "--calibration SPEC"),
        (options["remove-padding"], not packs, "padding to be removed: leave --no-remove-padding out"),
        (options["quantize-static"], int8 is None, "--int8 dynamic or --int8 static"),
        (static, int8 == "dynamic", "--int8 static"),
    ):
        if given and idle:
            raise UsageError(f"--{min(given).replace('_', '-')} needs {needs}")
