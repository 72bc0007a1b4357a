"""From a recipe to an artifact: the options that all commands share which build one, and what they do then."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from ..core.errors import UsageError
from ..core.processes import is_main
from ..core.quantities import parse_size
from ..core.recipe import Recipe, Step
from ..core.threads import DEFAULT
from .checks import reported, with_gates
from .common import CACHE_PANEL, CacheDir, Force, Json, Quiet, Verbose, cache_settings, open_screen

if TYPE_CHECKING:
    from ..core.manifest import Manifest, RunRecord
    from ..core.plan import Plan
    from ..core.reads import Read
    from ..pipeline.cache.store import CacheSettings
    from .render import Screen

R = TypeVar("R")

DEFAULT_EXPORT = "safetensors"

_OUTPUT = "Output"
_GATES = "Gates"

_EXCLUDING = (("dry_run", "depfile"), ("dry_run", "if_changed"), ("no_cache", "cache_dir"))
"""Options of which the first leaves the second nothing to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What is asked of a build, whatever is built; each field is an option."""

    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="The folder to write. It must not exist.", rich_help_panel=_OUTPUT
        ),
    ] = None
    export: Annotated[
        list[str] | None,
        typer.Option(
            "--export",
            metavar="NAME[:KEY=VALUE,...]",
            help="A format to write, with its parameters; `llmopt passes` lists them.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything random. [default: 0]", min=0)] = 0
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            metavar="N",
            help="Threads to compute on, whatever the machine has: with another number the last bits differ, and so "
            f"may codes. [default: {DEFAULT}]",
            min=1,
        ),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and write nothing.", rich_help_panel=_OUTPUT)
    ] = False
    save_recipe: Annotated[
        Path | None,
        typer.Option("--save-recipe", metavar="FILE", help="Write the recipe as YAML too.", rich_help_panel=_OUTPUT),
    ] = None
    force: Force = False
    gate: Annotated[
        list[str] | None,
        typer.Option(
            "--gate",
            metavar="METRIC<=LIMIT",
            help="What the artifact must meet, or it stands aside as DIR.failed (exit 3): perplexity_increase<=2%, "
            "size_ratio<=0.35, decode_speedup>=1.5, … ; may be given several times.",
            rich_help_panel=_GATES,
        ),
    ] = None
    gate_data: Annotated[
        list[str] | None,
        typer.Option(
            "--gate-data",
            metavar="SPEC",
            help="Test data for gates on quality: a .txt, .jsonl, .csv or .parquet file, or hf:NAME[/CONFIG][:SPLIT]. "
            "Of several each is for the gates whose metric its task gives, or that name it: METRIC@FILE<=LIMIT, the "
            "file's name without its ending.",
            rich_help_panel=_GATES,
        ),
    ] = None
    gate_task: Annotated[
        list[str] | None,
        typer.Option(
            "--gate-task",
            metavar="NAME",
            help="Task to measure, as of `llmopt eval`; one for all data, or one for each in order. [default: what "
            "fits the metrics, the model and the columns]",
            rich_help_panel=_GATES,
        ),
    ] = None
    gate_column: Annotated[
        list[str] | None,
        typer.Option(
            "--gate-column",
            metavar="[ROLE=]NAME",
            help="A column of the test data, as of `llmopt eval`.",
            rich_help_panel=_GATES,
        ),
    ] = None
    gate_confidence: Annotated[
        str | None,
        typer.Option(
            "--gate-confidence",
            metavar="SHARE",
            help="Confidence of the interval that must lie within a limit. [default: 95%]",
            rich_help_panel=_GATES,
        ),
    ] = None
    junit: Annotated[
        Path | None,
        typer.Option(
            "--junit",
            metavar="FILE",
            help="Write JUnit XML, a case for each verification and gate, also when the build fails.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None
    depfile: Annotated[
        Path | None,
        typer.Option(
            "--depfile",
            metavar="FILE",
            help="Write a rule for make and ninja that names every file that was read.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None
    if_changed: Annotated[
        bool,
        typer.Option(
            "--if-changed",
            help="Build nothing when DIR is what would be built: the same recipe, inputs and versions, and whole.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory",
            metavar="SIZE",
            help="Keep the process below this much memory, such as 2GiB: hidden states go to disk, samples come in "
            "smaller batches. Refused when it is too little.",
        ),
    ] = None
    cache_dir: CacheDir = None
    no_cache: Annotated[
        bool,
        typer.Option(
            "--no-cache",
            help="Take no results of passes from earlier runs, and keep none.",
            rich_help_panel=CACHE_PANEL,
        ),
    ] = False
    json: Json = False
    quiet: Quiet = False
    verbose: Verbose = False

    def __post_init__(self) -> None:
        """Refuse options that exclude each other.

        Raises:
            UsageError: it names two.
        """
        for pair in _EXCLUDING:
            if all(getattr(self, name) for name in pair):
                first, second = (f"--{name.replace('_', '-')}" for name in pair)
                raise UsageError(f"{first} and {second} exclude each other", hint=f"leave {second} out")

    def cache(self) -> CacheSettings | None:
        """Return where results of passes are kept; None where they are not.

        Raises:
            UsageError: LLMOPT_CACHE_SIZE is no size.
        """
        settings = cache_settings(self.cache_dir)
        return None if self.no_cache or settings.limit == 0 else settings

    def screen(self) -> Screen:
        """Return where results are shown; see `open_screen`."""
        return open_screen(json=self.json, quiet=self.quiet, verbose=self.verbose)

    def exports(self, default: str = DEFAULT_EXPORT) -> tuple[Step, ...]:
        """Return the formats that were asked for, or the usual one; see `exports`."""
        return exports(self.export or [default])


def building(*leave_out: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Add the options of a build, but for some, to a command; they reach it as its argument `build`.

    It stands below `with_options`, since that looks at the command's signature too.
    """
    hints = get_type_hints(Build, include_extras=True)
    added = [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=hints[one.name])
        for one in fields(Build)
        if one.name not in leave_out
    ]
    names = {one.name for one in added}

    def decorate(command: Callable[..., R]) -> Callable[..., R]:
        @wraps(command)
        def wrapper(**values: Any) -> R:
            given = {name: values.pop(name) for name in names & values.keys()}
            return command(**values, build=Build(**given))

        own = inspect.signature(command, eval_str=True)
        rest = [item for item in own.parameters.values() if item.name != "build"]
        wrapper.__signature__ = own.replace(parameters=[*rest, *added])  # pyright: ignore[reportAttributeAccessIssue]
        wrapper.__annotations__ = {item.name: item.annotation for item in [*rest, *added]}
        del wrapper.__wrapped__  # typer would look through it, at the signature without the added options
        return wrapper

    return decorate


def exports(written: Iterable[str]) -> tuple[Step, ...]:
    """Read `--export NAME[:KEY=VALUE,...]`.

    Raises:
        UsageError: an unknown exporter or parameter, a bad value.
    """
    from ..exporters import EXPORTERS
    from .options import parse_pairs

    steps: list[Step] = []
    for text in written:
        name, colon, pairs = text.partition(":")
        exporter = EXPORTERS.load(name, where=f"--export {text}")
        params = parse_pairs(pairs, exporter.Params, where=f"--export {name}") if colon else {}
        steps.append(Step(name, params))
    return tuple(steps)


def execute(
    recipe: Recipe, build: Build, screen: Screen, *, written_in: Path | None = None, notes: Iterable[str] = ()
) -> None:
    """Check a recipe, and unless it is a dry run, carry it out and show what was made.

    `written_in` is the file that holds the recipe. `notes` are said once the recipe is known to work.

    Raises:
        UsageError: the recipe cannot work, or no output was named.
    """
    recipe = with_gates(recipe, build)
    with reported(recipe, build, screen):
        _execute(recipe, build, screen, written_in=written_in, notes=notes)


def _execute(recipe: Recipe, build: Build, screen: Screen, *, written_in: Path | None, notes: Iterable[str]) -> None:
    from ..pipeline.output import check_output
    from ..pipeline.plan import make_plan
    from ..pipeline.reads import paths_of
    from .views import manifest_sections, plan_sections

    output = build.output
    if output is None and not build.dry_run:
        raise UsageError("no output folder given", hint="name one with -o DIR, or use --dry-run to see the plan")
    cache = build.cache()
    max_memory = None if build.max_memory is None else parse_size(build.max_memory)
    plan = make_plan(recipe, max_memory=max_memory, written_in=written_in)
    current = output is not None and build.if_changed and _is_current(plan, output, screen)
    if output is not None and not current:
        check_output(output, force=build.force or build.dry_run, inputs=paths_of(plan.reads))
    for note in () if current else notes:
        screen.reporter.note(note)
    if build.save_recipe is not None:
        _save_recipe(recipe, build.save_recipe, plan)
        screen.reporter.note(f"recipe written to {build.save_recipe}")
    if current:
        _write_depfile(plan, build)
        return
    if output is None or build.dry_run:
        screen.show(plan_sections(plan), plan.to_dict())
        return
    from ..pipeline.artifact import read_run
    from ..pipeline.run import run_plan

    manifest = run_plan(plan, output, force=build.force, reporter=screen.reporter, cache=cache)
    if not is_main():
        return
    _write_depfile(plan, build)
    run = read_run(output)
    sections = manifest_sections(
        manifest, output, source_bytes=plan.facts.bytes, gates=[] if run is None else run.gates
    )
    screen.show(sections, _document(manifest, output, run), summary=True)


def _save_recipe(recipe: Recipe, path: Path, plan: Plan) -> None:
    """Write the recipe.

    Raises:
        UsageError: the file would be one of those that the run reads, such as a .json beside the model.
    """
    from ..pipeline.reads import files_now, paths_of, steady
    from ..pipeline.recipe import dump_recipe
    from ..pipeline.steps import passes_of

    def is_read(files: Iterable[Read]) -> bool:
        return path.exists() and any(one.exists() and one.samefile(path) for one in paths_of(files))

    existed = path.exists()
    read = is_read(steady(plan.reads))
    if not read:
        dump_recipe(recipe, path)
        read = not existed and is_read(files_now(recipe, passes_of(recipe)))
    if read:
        if not existed:
            path.unlink()
        hint = "write it to another folder, or to a .yaml file"
        raise UsageError(f"`{path}` would be read as a file of the model or the data", where="--save-recipe", hint=hint)


def _is_current(plan: Plan, output: Path, screen: Screen) -> bool:
    """Return whether the artifact is what would be built, and say so, or what is different."""
    from ..pipeline.artifact import read_manifest, read_run
    from ..pipeline.outdated import why_outdated
    from ..pipeline.versions import own_version, versions

    why = why_outdated(plan, output, {"llmopt": own_version(), **versions()})
    manifest = read_manifest(output) if why is None else None
    if manifest is None:
        if output.exists():
            screen.reporter.note(f"{output} is built again: {why}")
        return False
    from .render import Lines

    document = {**_document(manifest, output, read_run(output)), "up_to_date": True}
    screen.show([Lines("", [f"{output} is up to date"])], document, summary=True)
    return True


def _document(manifest: Manifest, output: Path, run: RunRecord | None) -> dict[str, Any]:
    """Return what `--json` prints of an artifact that was built."""
    import msgspec

    return {"directory": str(output), **msgspec.to_builtins(manifest), "run": msgspec.to_builtins(run)}


def _write_depfile(plan: Plan, build: Build) -> None:
    if build.depfile is None or build.output is None:
        return
    from ..core.manifest import MANIFEST
    from ..pipeline.depfile import write_depfile
    from ..pipeline.reads import paths_of

    write_depfile(build.depfile, build.output / MANIFEST, paths_of(plan.reads))


def default_output(recipe: Path) -> Path:
    """Return the folder that `llmopt run` writes when none is named: the recipe's name, in the current folder.

    Raises:
        UsageError: the recipe's name has no ending to take off.
    """
    folder = Path(recipe.stem)
    if folder.name == recipe.name:
        raise UsageError(f"no output folder given for {recipe}", hint="name one with -o DIR")
    return folder
