"""`llmopt prune`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..core.errors import UsageError
from ..core.recipe import CalibrationSpec, ModelSpec, Recipe, Step
from ..passes import PASSES
from .building import Build, building, execute
from .common import CALIBRATION_PANEL, Calibration, ModelArgument
from .options import Options, Source, parse_pairs, with_options

DEPTH, WIDTH, VOCABULARY, SPARSITY = "prune-depth", "prune-width", "prune-vocab", "sparsify"
_DEPTH, _WIDTH, _SPARSITY = "Depth", "Width", "Sparsity"
_PATTERNS = ("2:4", "4:8")
_UNITS = frozenset({"mlp", "heads", "hidden"})


@with_options(
    Source(DEPTH, PASSES.load(DEPTH).Params, frozenset({"drop"}), _DEPTH),
    Source(WIDTH, PASSES.load(WIDTH).Params, _UNITS, _WIDTH),
    Source(SPARSITY, PASSES.load(SPARSITY).Params, frozenset({"sparsity", "pattern"}), _SPARSITY),
    Source("calibration", CalibrationSpec, frozenset({"data"}), CALIBRATION_PANEL),
    Source("model", ModelSpec, frozenset({"id"}), "Model"),
)
@building()
def command(
    model: ModelArgument,
    *,
    depth: Annotated[
        str | None,
        typer.Option(
            metavar="N|PERCENT",
            help="Take this many blocks out of every stack, such as 4 or 25%: those that matter least.",
            rich_help_panel=_DEPTH,
        ),
    ] = None,
    width: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT=AMOUNT,...",
            help="Take out mlp (neurons), heads (key and value heads with their queries) or hidden (channels of the "
            "residual stream): mlp=30%,heads=1.",
            rich_help_panel=_WIDTH,
        ),
    ] = None,
    vocab: Annotated[
        bool,
        typer.Option("--vocab", help="Take out the tokens that --calibration never has.", rich_help_panel=_WIDTH),
    ] = False,
    sparsity: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT|2:4|4:8",
            help="Set this share of the weights to zero, or two of every four, or four of every eight; shapes stay.",
            rich_help_panel=_SPARSITY,
        ),
    ] = None,
    calibration: Calibration = None,
    build: Build,
    options: Options,
) -> None:
    """Take layers, neurons, heads, tokens or single weights out of a model and export it.

    What matters least goes, measured on --calibration. The result is a smaller model that every exporter takes, opened
    again in its runtime and compared; how well it predicts is another matter: `llmopt eval` tells.

        llmopt prune ./my-llama -o my-llama-small --depth 25% --width mlp=30% --calibration wiki.txt
    """
    screen = build.screen()
    _refuse_idle(options, depth=depth, width=width, sparsity=sparsity, calibrated=calibration is not None)
    units = _units(width)
    zeros = _zeros(sparsity, options[SPARSITY], calibrated=calibration is not None)
    passes: list[Step] = []
    if depth is not None or options[DEPTH].get("layers"):
        passes.append(Step(DEPTH, {**_drop(depth), **options[DEPTH]}))
    if units:
        passes.append(Step(WIDTH, {**units, **options[WIDTH]}))
    if vocab:
        passes.append(Step(VOCABULARY))
    if sparsity is not None:
        passes.append(Step(SPARSITY, zeros))
    if not passes:
        raise UsageError("nothing to prune", hint="say what: --depth 25%, --width mlp=30%, --sparsity 50% or --vocab")
    recipe = Recipe(
        model=ModelSpec(id=model, **options["model"]),
        calibration=None if calibration is None else CalibrationSpec(data=calibration, **options["calibration"]),
        passes=tuple(passes),
        exports=build.exports(),
        seed=build.seed,
        threads=build.threads,
    )
    chosen = sparsity is not None and "method" not in options[SPARSITY] and calibration is None
    hint = "no --calibration: the smallest weights go; with calibration data sparsegpt loses less"
    execute(recipe, build, screen, notes=(hint,) if chosen else ())


def _refuse_idle(
    options: Options, *, depth: str | None, width: list[str] | None, sparsity: str | None, calibrated: bool
) -> None:
    """Refuse options that would do nothing.

    Raises:
        UsageError: it names what they need.
    """
    for given, idle, needs in (
        (set(options[DEPTH]) - {"layers"}, depth is None and not options[DEPTH].get("layers"), "--depth"),
        (options[WIDTH], not width, "--width"),
        (options[SPARSITY], sparsity is None, "--sparsity"),
        (options["calibration"], not calibrated, "--calibration SPEC"),
    ):
        if given and idle:
            raise UsageError(f"--{min(given).replace('_', '-')} needs {needs}")


def _drop(depth: str | None) -> dict[str, Any]:
    return {} if depth is None else {"drop": int(depth) if depth.isdigit() else depth}


def _units(written: list[str] | None) -> dict[str, Any]:
    """Read `--width mlp=30%,heads=1`.

    Raises:
        UsageError: something else than mlp, heads or hidden, or no amount.
    """
    found: dict[str, Any] = {}
    for text in written or ():
        pairs = parse_pairs(text, PASSES.load(WIDTH).Params, where="--width")
        foreign = next((name for name in pairs if name not in _UNITS), None)
        if foreign is not None:
            raise UsageError(f"--width has no `{foreign}`", hint=f"it has {', '.join(sorted(_UNITS))}")
        found |= {name: int(value) if str(value).isdigit() else value for name, value in pairs.items()}
    return found


def _zeros(sparsity: str | None, given: dict[str, Any], *, calibrated: bool) -> dict[str, Any]:
    """Return the parameters of the pass that makes zeros: without data the weights alone decide."""
    if sparsity is None:
        return {}
    wanted = {"pattern": sparsity} if sparsity in _PATTERNS else {"sparsity": sparsity}
    return {**wanted, **({} if calibrated else {"method": "magnitude"}), **given}
