"""From a recipe's names to passes and exporters, and the order in which they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.adapter import AdapterShape
from ..core.errors import UsageError
from ..core.exports import Exporter, GraphExporter
from ..core.params import Params, convert
from ..core.passes import BlockPass, GraphPass, Need, Pass, SurveyPass
from ..core.recipe import Recipe, Step
from ..exporters import EXPORTERS
from ..passes import PASSES

AnyPass = Pass[Any]
AnyExporter = Exporter[Any]


def passes_of(recipe: Recipe) -> list[AnyPass]:
    """Return the recipe's passes with their parameters.

    Raises:
        UsageError: an unknown pass or parameter, a wrong order, or something that a pass needs is not there.
    """
    passes: list[AnyPass] = []
    for index, step in enumerate(recipe.passes):
        where = f"pass {index + 1} of {len(recipe.passes)}, `{step.name}`"
        made = PASSES.load(step.name, where=where)
        _check_order(made, passes, where)
        built = made(_params(step, made.Params, where))
        if built.input_grid() is not None and not any(earlier.grid() is not None for earlier in passes):
            raise UsageError(
                f"`{step.name}` rounds the inputs of quantized layers",
                where=f"{where}: no pass before it quantizes weights",
                hint=f"put rtn or gptq before `{step.name}`",
            )
        if Need.UNROUNDED in built.requires() and not _rounded_in_last_sweep(passes):
            raise UsageError(
                f"`{step.name}` wins back what rounding loses",
                where=f"{where}: no pass right before it rounds weights",
                hint=f"put rtn, gptq or another that does right before `{step.name}`",
            )
        built.check_earlier(passes)
        _check_adapter(built, passes, where)
        if Need.CALIBRATION in built.requires() and recipe.calibration is None:
            raise UsageError(
                f"`{step.name}` needs calibration data",
                where=where,
                hint="name it with --calibration FILE, or `calibration: {data: FILE}` in the recipe",
            )
        passes.append(built)
    for index, one in enumerate(passes):
        if isinstance(one, SurveyPass):
            one.prepare(passes[index + 1 :])
    return passes


def _check_order(made: type[AnyPass], passes: Sequence[AnyPass], where: str) -> None:
    """Refuse a pass that cannot come after those before it."""
    name = made.name
    earlier = next((one.name for one in passes if one.name in made.not_after), None)
    if earlier is not None:
        first = f"put `{name}` first" if name != earlier else f"keep one of the two `{name}`"
        raise UsageError(f"`{name}` cannot come after `{earlier}`", where=where, hint=first)
    graph = next((one.name for one in passes if isinstance(one, GraphPass)), None)
    fitted = next((one.name for one in passes if _rounds(one)), None)
    if made.before_rounding and fitted is not None:
        earlier, why = fitted, f"it changes weights, and `{fitted}` has found grids or scales for what they were"
    elif graph is not None and not issubclass(made, GraphPass):
        earlier, why = graph, f"it works on the model's weights, `{graph}` on the graph that is traced from them"
    else:
        return
    raise UsageError(f"`{name}` cannot come after `{earlier}`", where=f"{where}: {why}", hint=f"put `{name}` first")


def _check_adapter(one: AnyPass, passes: Sequence[AnyPass], where: str) -> None:
    """Refuse a pass after one that leaves an adapter, unless it goes on from that adapter."""
    kept = kept_adapter(passes)
    if kept is None:
        return
    keeper, shape = kept
    made = one.keeps_adapter(passes)
    if made is None:
        raise UsageError(
            f"`{one.name}` cannot come after `{keeper.name}`",
            where=f"{where}: `{keeper.name}` leaves an adapter beside the weights, which fits no others",
            hint=f"put `{one.name}` first",
        )
    if (made.rank, set(made.targets)) != (shape.rank, set(shape.targets)):
        raise UsageError(
            f"`{one.name}` cannot go on from the adapter of `{keeper.name}`",
            where=f"{where}: {made}; the adapter that is there: {shape}",
            hint="give both the same rank and the same layers",
        )


def kept_adapter(passes: Sequence[AnyPass]) -> tuple[AnyPass, AdapterShape] | None:
    """Return the pass that leaves an adapter beside the weights, and its shape; None if none does."""
    found = ((one, one.keeps_adapter(passes[:index])) for index, one in enumerate(passes))
    return next(((one, shape) for one, shape in found if shape is not None), None)


def _rounded_in_last_sweep(passes: Sequence[AnyPass]) -> bool:
    """Return whether a pass that comes now shares a sweep with one that rounds weights."""
    last = sweeps(passes)[-1] if passes else []
    return any(_shares(one) and one.grid() is not None for one in last)


def exporters_of(recipe: Recipe) -> list[AnyExporter]:
    """Return the recipe's exporters with their parameters.

    Raises:
        UsageError: none, an unknown one, one named twice, or an unknown parameter.
    """
    if not recipe.exports:
        raise UsageError("nothing to export", hint=f"name an export: {', '.join(EXPORTERS)}")
    exporters: list[AnyExporter] = []
    for index, step in enumerate(recipe.exports):
        where = f"export {index + 1} of {len(recipe.exports)}, `{step.name}`"
        made = EXPORTERS.load(step.name, where=where)
        if any(other.name == step.name for other in exporters):
            raise UsageError(f"`{step.name}` is exported twice", where=where, hint="one folder holds one of each")
        exporters.append(made(_params(step, made.Params, where)))
    return exporters


def check_graph_passes(passes: Sequence[AnyPass], exporters: Sequence[AnyExporter]) -> None:
    """Refuse passes on a graph where no export is one.

    Raises:
        UsageError: it names the exports that are.
    """
    graph = next((one for one in passes if isinstance(one, GraphPass)), None)
    if graph is None or any(isinstance(exporter, GraphExporter) for exporter in exporters):
        return
    known = [name for name in EXPORTERS if issubclass(EXPORTERS.load(name), GraphExporter)]
    raise UsageError(
        f"`{graph.name}` works on a graph",
        where=f"exports: {', '.join(exporter.name for exporter in exporters)}",
        hint=f"add {' or '.join(f'`{name}`' for name in known)} to the exports",
    )


def check_graph_source(passes: Sequence[AnyPass], exporters: Sequence[AnyExporter], source: str) -> None:
    """Refuse what needs a model's weights and modules where the model is a graph already.

    Raises:
        UsageError: it names the passes and exports that work on graphs.
    """
    other = next((one for one in passes if not isinstance(one, GraphPass)), None)
    if other is not None:
        known = ", ".join(name for name in PASSES if issubclass(PASSES.load(name), GraphPass))
        raise UsageError(
            f"`{other.name}` does not work on an ONNX graph",
            where=f"`{source}` is one",
            hint=f"start from the model's safetensors; on graphs work {known}",
        )
    foreign = next((one for one in exporters if not isinstance(one, GraphExporter)), None)
    if foreign is not None:
        known = ", ".join(name for name in EXPORTERS if issubclass(EXPORTERS.load(name), GraphExporter))
        raise UsageError(
            f"an ONNX graph cannot be exported as `{foreign.name}`",
            where=f"`{source}` is one",
            hint=f"start from the model's safetensors; graphs are exported as {known}",
        )


def sweeps(passes: Sequence[AnyPass]) -> list[list[AnyPass]]:
    """Group the passes: neighbouring block passes share one sweep, every other pass and every survey stands alone."""
    groups: list[list[AnyPass]] = []
    for one in passes:
        if groups and _shares(one) and _shares(groups[-1][0]):
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _rounds(one: AnyPass) -> bool:
    return one.grid() is not None or one.input_grid() is not None or one.cache_number() is not None


def _shares(one: AnyPass) -> bool:
    return isinstance(one, BlockPass) and not isinstance(one, SurveyPass)


def _params(step: Step, kind: type[Params], where: str) -> Params:
    return convert(step.params, kind, where=where)
