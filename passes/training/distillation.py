"""Distillation from the handles of a student and its teacher to the handle of the student that has learnt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import Tensor, nn

from ...core.adapter import PREFIX, names
from ...core.errors import LlmoptError, UsageError
from ...core.passes import PassResult
from ...core.processes import is_main, world_size
from ..suited import WITHOUT_TEACHER
from .logit_cache import LogitCache
from .loop import Loop, Material, Settings
from .on_grid import learnt_weight, put_on_grids
from .order import Order
from .pupil import Pupil
from .states import Keeper, Progress, digest, read_state
from .teacher import Teacher
from .zeros import check_zeros, keep_zeros

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ...core.adapter import Adapter
    from ...core.model import ModelHandle
    from ...core.passes import PassContext
    from ...core.text import TextRows
    from ..distill import DistillParams

_UNITS = {"hidden": "ratio", "cosine": "distance"}
_DROPOUTS = ("attention_dropout", "dropout", "activation_dropout", "dropout_prob", "classifier_dropout")
_BETAS = (0.9, 0.95)
_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"
_NOT_OF_THE_RUN = frozenset({"checkpoint", "checkpoint_every", "cache"})
"""Parameters that do not change what is learnt."""


def distill(model: ModelHandle, params: DistillParams, context: PassContext) -> tuple[ModelHandle, PassResult]:
    """Teach `model`; see `passes.distill.Distill`."""
    assert context.text is not None, "the pass asked for text"
    assert context.work is not None, "the pipeline gives every pass a folder"
    accelerator = _accelerator(params)
    try:
        torch.manual_seed(context.seed)
        return _distill(model, params, context, text=context.text, work=context.work, accelerator=accelerator)
    finally:
        _release(accelerator)


def _distill(
    model: ModelHandle,
    params: DistillParams,
    context: PassContext,
    *,
    text: TextRows,
    work: Path,
    accelerator: Accelerator,
) -> tuple[ModelHandle, PassResult]:
    facts = model.facts
    losses = frozenset(params.losses(facts))
    result = PassResult()
    on_grid = len(model.quantized)
    ids, shared = _shared_tokens(params, context, result)
    rows, labels = _known_rows(text.rows, text.labels, ids, result, "rows")
    held_out, held_out_labels = _known_rows(text.held_out, text.held_out_labels, ids, result, "held-out rows")
    order = Order(
        rows,
        at_once=params.batch_size,
        parts=params.accumulation,
        processes=accelerator.num_processes,
        process=accelerator.process_index,
        seed=context.seed,
        labels=labels,
    )
    _check_rows(rows, order, text)
    handle, wanted = context.teacher, losses - WITHOUT_TEACHER
    teacher = None
    if wanted:
        assert handle is not None, "the pass asked for a teacher"
        _tell_sizes(facts.parameters, handle.facts.parameters, context, result)
        teacher = Teacher(
            lambda: handle.materialize(params.precision),
            wanted,
            ids=ids,
            shared=shared,
            device=accelerator.device,
            causal=facts.is_causal_lm,
        )
    identity = _identity(model, handle if wanted else None, params, text, processes=order.processes, seed=context.seed)
    caches = _caches(params, identity, rows, held_out)
    material = Material(order, rows, held_out, (labels, held_out_labels), caches)
    pupil = Pupil(
        _student(model, params),
        losses,
        temperature=params.temperature,
        shared=None if shared is None else shared.to(accelerator.device),
        causal=facts.is_causal_lm,
        heads=params.relation_heads,
    )
    inner = losses & {"hidden", "relation"}
    pupil.meet(None if teacher is None or not inner else teacher.model)
    trained = [one for one in pupil.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=params.learning_rate, betas=_BETAS, weight_decay=params.weight_decay)
    prepared, optimizer = accelerator.prepare(pupil, optimizer)
    checkpoint = context.checkpoints if params.checkpoint is None else Path(params.checkpoint)
    keeper = Keeper(work, checkpoint, identity, accelerator)
    settings = _settings(params, facts.is_causal_lm, params.losses(facts), checkpoint is not None)
    progress = Loop(
        accelerator,
        prepared,
        optimizer,
        teacher=teacher,
        material=material,
        settings=settings,
        keeper=keeper,
        reporter=context.reporter,
        batch_size=params.batch_size,
    ).run()
    _report(result, progress, settings, order, text)
    # Nothing of what learnt may be in memory any more when the student is written.
    best = keeper.best
    del prepared, optimizer, trained, pupil, teacher, material, keeper
    accelerator.free_memory()
    if not is_main():
        return model, result
    if not best.is_file():
        raise LlmoptError(
            f"`{best}` is missing", where="pass `distill`", hint="remove the checkpoint's folder; the run starts anew"
        )
    state = read_state(best)
    if params.lora_rank and on_grid:
        made = model.with_adapter(_factors(state), alpha=_alpha(params))
        result.metrics |= {"adapted_layers_count": len(state) // 2, "adapter_rank_max_count": params.lora_rank}
        result.notes.append(
            f"an adapter of {len(state) // 2} layers stays beside the model, whose {on_grid} quantized layers stay too"
        )
    elif params.lora_rank:
        made = model.with_parameters(_merged(model, params, state))
    else:
        made = model.with_parameters(state.get, quantized=learnt_weight(model, state) if on_grid else None)
    check_zeros(model, made)
    result.changed = [name for name in made.tensor_specs() if not torch.equal(made.read(name), model.read(name))]
    result.metrics["on_grid_count"] = on_grid
    return made, result


def _accelerator(params: DistillParams) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    # Where only inner states are compared, the head has no gradient, which several processes must be told of.
    unused = DistributedDataParallelKwargs(find_unused_parameters=bool(params.hidden or params.relation))
    precision = "bf16" if params.precision == "bfloat16" else "no"
    # Told that there is no GPU, accelerate joins several processes through gloo; otherwise each would train alone.
    alone = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=alone, mixed_precision=precision, kwargs_handlers=[unused])
    if accelerator.num_processes != world_size():
        raise LlmoptError(
            f"{world_size()} processes were started, {accelerator.num_processes} train together",
            where=f"pass `distill`: accelerate found {accelerator.distributed_type}",
            hint="launch with `accelerate launch --multi_gpu` or torchrun, and see what `accelerate env` says",
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and accelerator.distributed_type != "FSDP":
        raise LlmoptError(
            "accelerate does not shard the student, as it was asked to",
            where=f"pass `distill`: {accelerator.distributed_type}; it shards on several GPUs only",
            hint="launch without FSDP, and each process holds the whole student",
        )
    return accelerator


def _release(accelerator: Accelerator) -> None:
    """End the group of processes, and forget what accelerate keeps for the next `Accelerator`."""
    from accelerate.state import AcceleratorState

    accelerator.free_memory()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def _student(model: ModelHandle, params: DistillParams) -> nn.Module:
    """Return the student in float32, ready to learn: no dropout, and adapters where only they are to learn.

    Below adapters quantized layers are dequantized once, and no gradient reaches them.
    """
    student = model.materialize()
    without_dropout(student)
    if params.lora_rank:
        student = with_adapters(student, params, model.adapter)
        if model.quantized:
            _check_linear(student)
        if model.adapter is not None:
            _go_on_from(student, params, model)
    else:
        student.requires_grad_(True)
        keep_zeros(student, model)
        put_on_grids(student, model, scales=params.learn_scales)
    if params.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student.train()  # otherwise transformers does without
    return student


def without_dropout(model: nn.Module) -> None:
    """Turn dropout off: the teacher's answers are the regularization, and what is measured is what learns."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def with_adapters(student: Any, params: DistillParams, earlier: Adapter | None = None) -> Any:
    """Return the student with LoRA adapters (Hu et al., 2021) as the only parameters that learn.

    Args:
        student: a transformers model.
        params: rank and layers.
        earlier: an adapter of the same rank, whose layers are taken.
    """
    from peft import LoraConfig, get_peft_model

    assert params.lora_rank is not None
    targets: Any = list(params.lora_targets if earlier is None else earlier.layers) or "all-linear"
    config = LoraConfig(r=params.lora_rank, lora_alpha=_alpha(params), target_modules=targets)
    try:
        return get_peft_model(student, config)
    except ValueError as error:
        raise UsageError(
            "no layer takes an adapter",
            where=f"pass `distill`: {str(error).splitlines()[0][:200]}",
            hint="name layers as the model calls them with `lora_targets`, such as q_proj",
        ) from None


def _go_on_from(student: nn.Module, params: DistillParams, model: ModelHandle) -> None:
    """Give the student's adapters the values of the one that an earlier pass left, whatever the scale of either."""
    assert model.adapter is not None, "asked for where there is one"
    assert params.lora_rank is not None, "the plan refuses other passes"
    factor = model.adapter.scale * params.lora_rank / _alpha(params)
    found = model.adapter_tensors()
    state: dict[str, Tensor] = {}
    for layer in model.adapter.layers:
        down, up = (found[name] for name in names(layer))
        state[f"{PREFIX}{layer}{_DOWN}"], state[f"{PREFIX}{layer}{_UP}"] = down, factor * up
    unknown = student.load_state_dict(state, strict=False).unexpected_keys
    assert not unknown, unknown


def _alpha(params: DistillParams) -> int:
    assert params.lora_rank is not None
    return params.lora_alpha or 2 * params.lora_rank


def _check_linear(student: nn.Module) -> None:
    """Refuse adapters of other layers than linear ones, before they learn: engines load no others beside a base."""
    for name, one in student.named_parameters():
        if one.requires_grad and not (name.endswith((_DOWN, _UP)) and one.ndim == 2):
            raise UsageError(
                f"the adapter of `{name.removeprefix(PREFIX).partition('.lora_')[0]}` cannot be kept beside the model",
                where="pass `distill`: it is no linear layer",
                hint="name linear layers with `lora_targets`",
            )


def _factors(state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the learnt matrices `down` and `up` by the path of their module."""
    paths = [name.removesuffix(_DOWN).removeprefix(PREFIX) for name in state if name.endswith(_DOWN)]
    return {path: (state[f"{PREFIX}{path}{_DOWN}"], state[f"{PREFIX}{path}{_UP}"]) for path in paths}


def _merged(model: ModelHandle, params: DistillParams, state: dict[str, Tensor]) -> Any:
    """Return what gives the student's parameters with the learnt adapters merged into them."""
    student = with_adapters(model.materialize(), params)
    missing = set(state) - {name for name, _ in student.named_parameters()}
    assert not missing, missing
    student.load_state_dict(state, strict=False)
    return dict(student.merge_and_unload(safe_merge=True).named_parameters()).get


def _shared_tokens(
    params: DistillParams, context: PassContext, result: PassResult
) -> tuple[Tensor | None, Tensor | None]:
    """Return the teacher's id for each of the student's, and the student's ids that it knows; None where all agree."""
    if context.teacher_ids is None or not params.losses_need_teacher:
        return None, None
    ids = torch.tensor(list(context.teacher_ids))
    shared = (ids >= 0).nonzero().squeeze(-1)
    if not params.align_vocab:
        raise UsageError(
            "student and teacher have different vocabularies",
            where=f"pass `distill`: {len(shared)} of the student's {len(ids)} tokens are known to the teacher",
            hint="let tokens be matched by their strings with `align_vocab: true`, or use another teacher",
        )
    result.notes.append(f"{len(shared)} of {len(ids)} tokens are shared with the teacher, matched by their strings")
    return ids, shared


def _known_rows(
    rows: Sequence[Sequence[int]], labels: Sequence[int] | None, ids: Tensor | None, result: PassResult, what: str
) -> tuple[Sequence[Sequence[int]], Sequence[int] | None]:
    """Return the rows that hold only tokens which the teacher knows, and their labels."""
    if ids is None:
        return rows, labels
    places = [place for place, row in enumerate(rows) if bool((ids[torch.tensor(row)] >= 0).all())]
    known = [rows[place] for place in places]
    if len(known) < len(rows):
        result.notes.append(
            f"left out {len(rows) - len(known)} of {len(rows)} {what}: the teacher lacks a token in them"
        )
    return known, None if labels is None else [labels[place] for place in places]


def _check_rows(rows: Sequence[Sequence[int]], order: Order, text: TextRows) -> None:
    if len(rows) >= order.rows_in_step:
        return
    raise LlmoptError(
        f"`{text.source}` holds less than one batch",
        where=f"pass `distill`: {len(rows)} rows, a step takes {order.rows_in_step}",
        hint="name more text, or use a smaller --length, --batch-size or --accumulation",
    )


def _tell_sizes(student: int, teacher: int, context: PassContext, result: PassResult) -> None:
    if student > teacher:
        message = f"the student has {student} parameters, more than its teacher's {teacher}"
        context.reporter.warn(message)
        result.notes.append(message)


def _identity(
    model: ModelHandle,
    teacher: ModelHandle | None,
    params: DistillParams,
    text: TextRows,
    *,
    processes: int,
    seed: int,
) -> dict[str, Any]:
    """Return what a run is known by: another of these, and it learns something else."""
    given = {key: value for key, value in msgspec.to_builtins(params).items() if key not in _NOT_OF_THE_RUN}
    if params.checkpoint is None and params.cache is None:
        return {}  # nothing is compared, so nothing needs to be read
    return {
        **given,
        "student_weights": digest(model),
        "teacher_weights": None if teacher is None else digest(teacher),
        "text": text.sha256,
        "seed": seed,
        "processes": processes,
    }


def _caches(
    params: DistillParams,
    identity: dict[str, Any],
    rows: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
) -> tuple[LogitCache, LogitCache] | None:
    if params.cache is None:
        return None
    asked = {key: identity[key] for key in ("teacher_weights", "text", "seed")} | {"align_vocab": params.align_vocab}
    folder, top, temperature = Path(params.cache), params.top_k, params.temperature
    made = [
        LogitCache(folder / name, asked, those, top=top, temperature=temperature)
        for name, those in (("rows", rows), ("held-out", held_out))
    ]
    return made[0], made[1]


def _settings(params: DistillParams, causal: bool, weights: dict[str, float], checkpoints: bool) -> Settings:
    measured = (*weights, *(("lm",) if causal and "lm" not in weights else ()))
    return Settings(
        steps=params.steps,
        rate=params.learning_rate,
        warmup=params.warmup,
        clip=params.clip,
        evaluate_every=params.evaluate_every or max(1, params.steps // 10),
        patience=params.patience,
        checkpoint_every=params.checkpoint_every if checkpoints else None,
        weights=weights,
        measured=measured,
    )


def _report(result: PassResult, progress: Progress, settings: Settings, order: Order, text: TextRows) -> None:
    result.curve = progress.curve
    result.metrics = {
        "steps_count": progress.step,
        "best_step_count": progress.best_step,
        "learnt_rows_count": progress.step * order.rows_in_step,
    }
    points = [point for point in progress.curve if any(key.startswith("held_out_") for key in point)]
    for name in settings.measured if points else ():
        unit = _UNITS.get(name, "nats")
        best = next(point for point in points if point["step"] == progress.best_step)
        result.metrics[f"held_out_{name}_before_{unit}"] = points[0][f"held_out_{name}"]
        result.metrics[f"held_out_{name}_after_{unit}"] = best[f"held_out_{name}"]
    if not points:
        result.notes.append(f"`{text.source}` is too short to hold rows out: the last state was kept, unmeasured")
    elif progress.best_step == 0:
        result.notes.append("learning did not lessen the loss on held-out rows; the student stays as it was")
    if progress.stopped:
        result.notes.append(
            f"stopped after {progress.step} of {settings.steps} steps: the loss on held-out rows fell no more"
        )
