"""What a pass asks for beside the model: a teacher, and text of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import UsageError
from ..core.facts import ModelFacts
from ..core.passes import Need, PassContext
from ..core.recipe import CalibrationSpec, ModelSpec
from ..core.text import TextRequest
from ..models.checkpoint import Checkpoint
from ..models.locate import Location, context_length, locate
from ..models.outline import outline
from ..models.vocabulary import ids_in, vocabulary

if TYPE_CHECKING:
    from ..models.handle import TorchModel
    from .steps import AnyPass


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run began.

    Attributes:
        location: the recipe's model.
        checkpoint: its tensors.
        facts: its outline.
        calibration: the data that the recipe calibrates on.
        work: scratch space.
    """

    location: Location
    checkpoint: Checkpoint
    facts: ModelFacts
    calibration: CalibrationSpec | None
    work: Path


def check_materials(
    one: AnyPass, location: Location, source: ModelFacts, facts: ModelFacts, calibration: CalibrationSpec | None
) -> None:
    """Refuse a pass whose teacher or text is not there or does not fit.

    Args:
        one: the pass.
        location: the recipe's model.
        source: its outline.
        facts: the outline as the passes before this one leave it.
        calibration: the data that the recipe calibrates on.

    Raises:
        UsageError: it says what is missing.
    """
    if Need.TEACHER in one.requires():
        named = one.teacher()
        if named is None:
            one.check_teacher(facts, source, same_vocabulary=True)
        else:
            found = locate(ModelSpec(id=named, trust_remote_code=location.trust_remote_code))
            if found.graph is not None:
                raise UsageError(
                    f"teacher `{named}` is an ONNX graph",
                    where=f"pass `{one.name}`",
                    hint="give the folder that holds its safetensors",
                )
            teacher = outline(found, Checkpoint(found.folder))
            same = vocabulary(location.folder) == vocabulary(found.folder) if facts.has_tokenizer else True
            one.check_teacher(facts, teacher, same_vocabulary=same)
    request = one.text(facts)
    if request is not None:
        _check_text(one, request, facts, calibration)


def _check_text(one: AnyPass, request: TextRequest, facts: ModelFacts, calibration: CalibrationSpec | None) -> None:
    from ..calibration.source import open_source

    request = _named(one, request, calibration)
    assert request.data is not None
    open_source(request.data, request.column)
    if not facts.has_tokenizer:
        raise UsageError(
            f"`{facts.source}` has no tokenizer",
            where=f"pass `{one.name}` reads text",
            hint="put tokenizer.json and tokenizer_config.json beside the weights",
        )
    context = context_length(facts.config)
    if context is not None and request.length > context:
        raise UsageError(
            f"rows of {request.length} tokens are longer than the context of `{facts.source}`",
            where=f"pass `{one.name}`: config.json says {context}",
            hint=f"use a length of {context} or less",
        )


def _named(one: AnyPass, request: TextRequest, calibration: CalibrationSpec | None) -> TextRequest:
    """Return the request with its data, which the recipe's calibration may name."""
    if request.data is not None:
        return request
    if calibration is None:
        raise UsageError(
            f"`{one.name}` needs text",
            where=f"pass `{one.name}` names no data, and the recipe has no calibration data",
            hint="name it with --data SPEC, or `data: FILE` in the pass",
        )
    return replace(request, data=calibration.data, column=calibration.column)


def with_materials(one: AnyPass, model: TorchModel, context: PassContext, start: Start, number: int) -> PassContext:
    """Return the context with what pass `one`, the recipe's `number`-th, asked for."""
    work = start.work / f"pass-{number}"
    work.mkdir(exist_ok=True)
    context = replace(context, work=work)
    if Need.TEACHER in one.requires():
        teacher = _teacher(one, start, work)
        student = vocabulary(model.location.folder) if model.facts.has_tokenizer else {}
        same = not model.facts.has_tokenizer or teacher.location.folder == model.location.folder
        ids = None if same else ids_in(student, vocabulary(teacher.location.folder))
        context = replace(context, teacher=teacher, teacher_ids=ids)
    request = one.text(model.facts)
    if request is not None:
        from ..calibration.packed import load_rows
        from ..models.text import load_tokenizer

        tokenizer = load_tokenizer(model.location.folder, trust_remote_code=model.location.trust_remote_code)
        named = _named(one, request, start.calibration)
        rows = load_rows(named, tokenizer, work / "text.bin", seed=context.seed, reporter=context.reporter)
        context = replace(context, text=rows)
    return context


def _teacher(one: AnyPass, start: Start, work: Path) -> TorchModel:
    from ..models.handle import TorchModel

    named = one.teacher()
    if named is None:
        return TorchModel.create(start.location, start.checkpoint, start.facts, work / "teacher")
    location = locate(ModelSpec(id=named, trust_remote_code=start.location.trust_remote_code))
    checkpoint = Checkpoint(location.folder)
    return TorchModel.create(location, checkpoint, outline(location, checkpoint), work / "teacher")
