"""From what the user wrote to a folder on this machine: a local folder, or a snapshot of a hub repository."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..core.errors import LlmoptError, UsageError
from ..core.recipe import ModelSpec, Task
from ..core.untrusted import UnreadableError, check_config, check_links, read_json
from .sentence import Sentence, is_sentence_folder, read_sentence

GRAPH = "model.onnx"
_MAX_CONFIG = 16 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_SNAPSHOT = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True, slots=True)
class Location:
    """A model folder.

    Attributes:
        folder: where its files lie.
        source: what the user wrote.
        revision: the commit, for a hub repository.
        trust_remote_code: whether Python code of the model may run.
        task: what the model is used for, where that is not what config.json says.
        sentence: how it makes embeddings of texts, None when it does not.
        graph: the ONNX file that is the model, None where weights in safetensors are.
    """

    folder: Path
    source: str
    revision: str | None = None
    trust_remote_code: bool = False
    task: Task | None = None
    sentence: Sentence | None = None
    graph: Path | None = None


def locate(spec: ModelSpec) -> Location:
    """Find the model's folder, fetching it when `spec.id` is a hub id.

    Raises:
        UsageError: no such folder, no model in it, only pickled weights, or code that was not asked for.
        LlmoptError: the hub does not answer or does not have it.
    """
    path = Path(spec.id).expanduser()
    if path.exists() and spec.revision is not None:
        where = f"revision {spec.revision}: `{spec.id}` lies on this machine"
        raise UsageError("revisions are those of the hub", where=where, hint="leave the revision out")
    if path.is_file() and path.suffix == ".onnx":
        return _of_graph(path, spec)
    if path.is_file():
        raise UsageError(f"`{spec.id}` is a file, not a model folder", hint="give the folder that holds config.json")
    if path.is_dir():
        if (graph := _graph_in(path, spec)) is not None:
            return _of_graph(graph, spec)
        folder, revision = path, None
    elif looks_like_hub_id(spec.id):
        folder = _snapshot(spec)
        revision = folder.name
    else:
        raise UsageError(f"no model at `{spec.id}`", hint=_missing_hint(path))
    if is_sentence_folder(folder) and spec.task in {None, "sentence-similarity"}:
        sentence = read_sentence(folder)
        check_folder(sentence.transformer, spec)
        task = "sentence-similarity"
        return Location(sentence.transformer, spec.id, revision, spec.trust_remote_code, task, sentence)
    check_folder(folder, spec)
    return Location(folder, spec.id, revision, spec.trust_remote_code, spec.task)


def _of_graph(graph: Path, spec: ModelSpec) -> Location:
    """Return an ONNX file as a model; its head is in it, so no task can choose another."""
    if spec.task is not None:
        raise UsageError(
            f"a task chooses the head of a model, and an ONNX graph has its own: {spec.task}",
            where=f"`{spec.id}` is one",
            hint="leave the task out",
        )
    return Location(graph.parent, spec.id, graph=graph)


def _graph_in(folder: Path, spec: ModelSpec) -> Path | None:
    """Return the ONNX file of a folder that holds no safetensors, None if it holds none.

    Raises:
        UsageError: it holds several, or one by another name, so that it is not clear which is meant.
    """
    graphs = sorted(folder.glob("*.onnx"))
    if not graphs or any(folder.glob("*.safetensors")):
        return None
    if folder / GRAPH not in graphs:
        raise UsageError(
            f"`{spec.id}` holds no {GRAPH}",
            where=f"its graphs are {', '.join(graph.name for graph in graphs[:5])}",
            hint=f"give the file itself, such as {graphs[0]}",
        )
    return folder / GRAPH


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json as a dict.

    Raises:
        LlmoptError: it is no JSON object.
    """
    path = folder / "config.json"
    check_links(folder, path.name)
    try:
        config = read_json(path, limit=_MAX_CONFIG)
    except UnreadableError as error:
        hint = "fetch config.json again, or save it with transformers' save_pretrained"
        raise LlmoptError("config.json is not valid JSON", where=f"{path}\n{error}", hint=hint) from None
    problem = _problem(config)
    if problem is None:
        try:
            check_config(config)
        except UnreadableError as error:
            problem = f"config.json makes no model: {error}"
    if problem is not None:
        raise LlmoptError(problem, where=str(path), hint='it begins like {"architectures": ["LlamaForCausalLM"], …')
    return config


def _problem(config: Any) -> str | None:
    """Return what is wrong with the fields of a config.json that are read here, None if nothing is."""
    if not isinstance(config, dict):
        return "config.json is not an object"
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name.isidentifier() for name in names):
        return "`architectures` in config.json is not a list of names"
    kind = config.get("model_type") or ""
    if not isinstance(kind, str) or not re.fullmatch(r"[\w.-]*", kind) or ".." in kind:
        return "`model_type` in config.json is not a name"
    for name in ("text_config", "quantization_config"):
        if not isinstance(config.get(name) or {}, dict):
            return f"`{name}` in config.json is not an object"
    return None


def context_length(config: dict[str, Any]) -> int | None:
    """Return how many positions a model has by its config.json, None where that sets no limit."""
    config = config.get("text_config") or config
    lengths = [config.get(name) for name in ("max_position_embeddings", "n_positions")]
    if config.get("is_encoder_decoder"):
        del lengths[1]  # T5 has the field, and no such limit
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def check_folder(folder: Path, spec: ModelSpec) -> None:
    """Refuse a folder that is no Hugging Face model, or one that would need pickles or unasked code."""
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"`{spec.id}` is not a model folder",
            where=f"there is no config.json in {folder}",
            hint="give the folder that transformers' save_pretrained wrote, or a hub id such as org/name",
        )
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(found.name for pattern in _PICKLES for found in folder.glob(pattern))
        if pickles:
            raise UsageError(
                f"`{spec.id}` holds pickled weights only",
                where=f"{', '.join(pickles[:3])}: loading a pickle can run any code",
                hint="convert it once where you trust it: "
                "AutoModel.from_pretrained(DIR).save_pretrained(OUT) with transformers, then use OUT",
            )
        raise UsageError(
            f"`{spec.id}` holds no weights",
            where=f"there is no *.safetensors file in {folder}",
            hint="fetch the weights too; the folder is given that holds them beside config.json",
        )
    if "auto_map" in read_config(folder) and not spec.trust_remote_code:
        architecture = (read_config(folder).get("architectures") or ["?"])[0]
        if not _is_native(read_config(folder).get("model_type")):
            raise UsageError(
                f"`{spec.id}` needs Python code of its own ({architecture})",
                where="config.json has an `auto_map`",
                hint="read that code, then allow it with --trust-remote-code",
            )


def _is_native(model_type: str | None) -> bool:
    """Return whether the installed transformers has its own implementation; looks at its folders, imports nothing."""
    from importlib.util import find_spec

    spec = find_spec("transformers")
    roots = spec.submodule_search_locations if spec is not None else None
    return bool(model_type and roots and (Path(next(iter(roots))) / "models" / model_type).is_dir())


def looks_like_hub_id(name: str) -> bool:
    """Return whether `name` could be `org/name` or `name` on the hub, and is no path."""
    parts = name.split("/")
    return len(parts) <= 2 and all(parts) and not name.startswith((".", "~", "/")) and "\\" not in name


def near_folder(path: Path) -> str | None:
    """Return a hint for a folder that is not there: one beside it with a like name, None without such."""
    parent = path.parent
    folders = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    close = get_close_matches(path.name, folders, n=1, cutoff=0.5)
    place = f"in {parent}: " if parent != Path() else ""
    return f"{place}did you mean `{close[0]}`?" if close else None


def _missing_hint(path: Path) -> str:
    return near_folder(path) or "give a local folder or a hub id such as org/name"


def _snapshot(spec: ModelSpec) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*_SNAPSHOT, "*.py"] if spec.trust_remote_code else _SNAPSHOT
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    try:
        return Path(snapshot_download(spec.id, revision=spec.revision, allow_patterns=patterns))
    except HFValidationError:
        raise UsageError(f"no model at `{spec.id}`", hint=_missing_hint(Path(spec.id))) from None
    except LocalEntryNotFoundError:
        reason = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else "the hub did not answer"
        raise LlmoptError(
            f"no model at `{spec.id}`",
            where=f"no such folder here; as a hub id: {reason}",
            hint=_missing_hint(Path(spec.id)),
        ) from None
    except (HfHubHTTPError, OSError) as error:
        lines = str(error).strip().splitlines()
        raise LlmoptError(
            f"the hub does not give `{spec.id}`",
            where=lines[0] if lines else type(error).__name__,
            hint="check the name and --revision; a gated model needs a token (`hf auth login`)",
        ) from None
