"""From a task to the transformers class with the right head, and whether a checkpoint has the weights for it.

Which class does a task is asked of optimum's TasksManager and of transformers' own tables.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..core.errors import LlmoptError, UsageError
from ..core.recipe import TASKS, Task
from .sentence import is_sentence_folder

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .locate import Location

_BASE: frozenset[Task] = frozenset({"feature-extraction", "sentence-similarity"})
"""Tasks that want the hidden states, so any checkpoint of the architecture does."""


def architecture_for(location: Location, config: dict[str, Any]) -> str:
    """Return the name of the class that a model is loaded as; imports nothing heavy unless the task asks for another.

    Args:
        location: the model, with its task.
        config: its config.json.

    Raises:
        UsageError: transformers has no class for the task.
    """
    named = str((config.get("architectures") or [""])[0])
    if location.task is None or (location.task in _BASE and _is_base(named)):
        return named
    from .skeleton import load_config

    found = _classes(location.task, load_config(location))
    if not found:
        raise _refused(location, f"transformers has no class for it with model_type {config.get('model_type')}", "")
    return named if named in found else found[0]


def check_task(location: Location, checkpoint: Checkpoint) -> None:
    """Refuse a task whose head the checkpoint does not have: transformers would make up its weights.

    Raises:
        UsageError: it names the tasks that the weights fit.
    """
    from .skeleton import load_config

    if location.task is None:
        return
    config = load_config(location)
    reason = _obstacle(location.task, config, location, checkpoint)
    if reason is None:
        return
    fitting = [task for task in TASKS if _obstacle(task, config, location, checkpoint) is None]
    raise _refused(location, reason, f"its weights fit: --task {', '.join(fitting)}" if fitting else "")


def _obstacle(task: Task, config: Any, location: Location, checkpoint: Checkpoint) -> str | None:
    """Return why a checkpoint cannot do a task, None if it can."""
    from .naming import Naming
    from .skeleton import empty_model

    named = str((getattr(config, "architectures", None) or [""])[0])
    if task == "sentence-similarity" and not is_sentence_folder(location.folder) and location.sentence is None:
        return "it has no modules.json, which says how its tokens are pooled"
    classes = [named] if task in _BASE and _is_base(named) else _classes(task, config)
    if not classes:
        return f"transformers has no class for it with model_type {config.model_type}"
    if task == "text-generation" and named not in classes and not _reads_from_left(config):
        return "it reads texts from both sides"
    others = [other for other in TASKS if other not in _BASE and named in _classes(other, config)]
    if task not in _BASE and others and named not in classes:
        return f"config.json names {named}, whose head is for {others[0]}"
    try:
        Naming(empty_model(config, replace(location, task=task), checkpoint), checkpoint)
    except LlmoptError as error:
        return f"{classes[0]}: {error.what}"
    return None


def _classes(task: Task, config: Any) -> list[str]:
    """Return the names of the classes that do a task with such a config, the usual one first."""
    from optimum.exporters.tasks import TasksManager

    try:
        auto = TasksManager.get_model_class_for_task(task, model_type=config.model_type)
        found = auto._model_mapping[type(config)]
    except (KeyError, ValueError):
        return []
    return [one.__name__ for one in (found if isinstance(found, tuple | list) else [found])]


def _is_base(architecture: str) -> bool:
    return architecture.endswith("Model") and not architecture.endswith("LMHeadModel")


def _reads_from_left(config: Any) -> bool:
    """Return whether a token sees the ones before it alone: no encoder, with or without a decoder behind it."""
    if config.is_encoder_decoder:
        return False
    return bool(getattr(config, "is_decoder", False)) or not _classes("fill-mask", config)


def _refused(location: Location, why: str, hint: str) -> UsageError:
    return UsageError(
        f"`{location.source}` cannot do {location.task}", where=why, hint=hint or "leave --task out, or choose another"
    )
