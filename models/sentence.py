"""Reading a sentence-transformers folder: a transformer, how its tokens are pooled, and what follows. Without torch.

modules.json              the list of modules, each with its type and its folder
1_Pooling/config.json     how the tokens of a text become one vector
2_Dense/                  a linear layer after it: config.json and model.safetensors
2_Normalize/              the vector gets length 1; the folder is empty
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import LlmoptError, UsageError
from ..core.untrusted import UnreadableError, is_inner_path, lies_in, read_json

MODULES = "modules.json"
_SETTINGS = ("sentence_bert_config.json", "config_sentence_transformers.json")
_MAX_SETTINGS = 16 << 20
_FLAG, _FLAG_END = "pooling_mode_", "_tokens"

POOLING = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "lasttoken")
"""The known ways to pool, in the order in which sentence-transformers puts several side by side."""

ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid")
"""The functions of `torch.nn` that may follow a dense layer."""


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear layer after the pooling.

    Attributes:
        folder: holds its model.safetensors.
        activation: name of the function that follows it, in `torch.nn`.
    """

    folder: Path
    activation: str


@dataclass(frozen=True, slots=True)
class Sentence:
    """How the states of a text's tokens become its embedding.

    Attributes:
        root: the folder that holds modules.json.
        modules: modules.json.
        pooling: the ways to pool, whose results stand side by side.
        dense: linear layers after that.
        normalize: whether the embedding gets length 1.
    """

    root: Path
    modules: tuple[dict[str, Any], ...]
    pooling: tuple[str, ...]
    dense: tuple[Dense, ...] = ()
    normalize: bool = False

    @property
    def transformer(self) -> Path:
        """The folder of the transformer, as a rule the root itself."""
        return self.root / str(self.modules[0].get("path", ""))

    def save(self, directory: Path) -> None:
        """Write what makes `directory`, which holds the transformer, a sentence-transformers folder as well."""
        modules = [{**self.modules[0], "path": ""}, *self.modules[1:]]
        (directory / MODULES).write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
        for name in _SETTINGS:
            found = next((place / name for place in (self.transformer, self.root) if (place / name).is_file()), None)
            if found is not None:
                shutil.copyfile(found, directory / name)
        for module in modules[1:]:
            for file in ("config.json", "model.safetensors"):
                source = self.root / str(module["path"]) / file
                if module["path"] and source.is_file():
                    target = directory / str(module["path"]) / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)


def is_sentence_folder(folder: Path) -> bool:
    """Return whether sentence-transformers wrote `folder`."""
    return (folder / MODULES).is_file()


def read_sentence(root: Path) -> Sentence:
    """Read how a sentence-transformers folder makes embeddings.

    Raises:
        UsageError: it does something that is not known here.
        LlmoptError: a file is damaged or missing.
    """
    modules = _json(root / MODULES)
    if not isinstance(modules, list) or not all(isinstance(one, dict) and "type" in one for one in modules):
        raise _damaged(root / MODULES, "it is no list of modules with a type")
    kinds = [str(one["type"]).rpartition(".")[2] for one in modules]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise _unknown(root, f"its modules are {', '.join(kinds)}", "a Transformer followed by a Pooling is known")
    for one in modules:
        path = str(one.setdefault("path", ""))
        if not is_inner_path(path or ".") or not lies_in(root / path, root):
            raise _damaged(root / MODULES, f"path {path[:200]!r} leads out of the folder")
    dense: list[Dense] = []
    for kind, module in zip(kinds[2:], modules[2:], strict=True):
        if kind == "Dense":
            dense.append(_dense(root / module["path"]))
        elif kind not in {"Normalize", "Dropout"}:
            raise _unknown(root, f"module {kind}", "Dense and Normalize may follow the Pooling")
    normalize = "Normalize" in kinds
    if normalize and "Dense" in kinds[kinds.index("Normalize") :]:
        raise _unknown(root, "a Dense after Normalize", "Normalize is known as the last module")
    return Sentence(root, tuple(modules), _pooling(root / modules[1]["path"] / "config.json"), tuple(dense), normalize)


def _pooling(path: Path) -> tuple[str, ...]:
    config = _json(path)
    flags = {
        name.removeprefix(_FLAG).removesuffix(_FLAG_END).removesuffix("_token")
        for name, value in config.items()
        if name.startswith(_FLAG) and value is True
    }
    if "pooling_mode" in config:  # newer versions name the way, or the ways
        named = config["pooling_mode"]
        flags = {named} if isinstance(named, str) else set(named)
        flags = {str(name).removesuffix(_FLAG_END) for name in flags}
    unknown = sorted(flags - set(POOLING))
    if unknown or not flags:
        where = f"{path}\npooling {', '.join(unknown) or 'is not named'}"
        raise UsageError("unknown pooling", where=where, hint=f"known: {', '.join(POOLING)}")
    if config.get("include_prompt", True) is False and _prompts(path.parent.parent):
        raise _unknown(path.parent.parent, "`include_prompt: false`", "prompts that count as text are known")
    return tuple(way for way in POOLING if way in flags)


def _prompts(root: Path) -> dict[str, Any]:
    path = root / _SETTINGS[1]
    return dict(_json(path).get("prompts") or {}) if path.is_file() else {}


def _dense(folder: Path) -> Dense:
    config = _json(folder / "config.json")
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if activation not in ACTIVATIONS:
        raise _unknown(folder, f"activation_function {activation}", f"known: {', '.join(ACTIVATIONS)}")
    for name in ("module_input_name", "module_output_name"):
        if config.get(name, "sentence_embedding") not in {"sentence_embedding", None}:
            raise _unknown(folder, f"{name} {config[name]}", "a Dense works on `sentence_embedding`")
    if not (folder / "model.safetensors").is_file():
        raise UsageError(
            f"`{folder}` holds no safetensors",
            where="loading a pickle can run any code" if any(folder.glob("*.bin")) else "there is no model.safetensors",
            hint="convert it once where you trust it: sentence-transformers' save() writes model.safetensors",
        )
    return Dense(folder, activation)


def _json(path: Path) -> Any:
    try:
        content = read_json(path, limit=_MAX_SETTINGS)
    except FileNotFoundError:
        raise _damaged(path, "there is no such file") from None
    except UnreadableError as error:
        raise _damaged(path, str(error)) from None
    if path.name != MODULES and not isinstance(content, dict):
        raise _damaged(path, "it is no object")
    return content


def _damaged(path: Path, why: str) -> LlmoptError:
    return LlmoptError(
        f"the sentence-transformers folder is damaged: {path.name}", where=f"{path}\n{why}", hint="fetch it again"
    )


def _unknown(root: Path, what: str, known: str) -> UsageError:
    return UsageError(
        f"`{root}` makes embeddings in a way that is not known here",
        where=what,
        hint=f"{known}; --task feature-extraction exports the transformer without its pooling",
    )
