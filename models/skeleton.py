"""The model without its weights: modules on the meta device, repeated blocks found by structure."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from ..core.activations import QuantizedCache, QuantizedInput
from ..core.block import Linear
from ..core.errors import LlmoptError, UsageError
from .checkpoint import Checkpoint
from .locate import Location, read_config
from .memory import trim
from .naming import Naming, Rows
from .pooling import drop_pooler, pool_sentences
from .rounding import round_activations_of
from .tasks import architecture_for

_SMALLEST = 16
CONFIG_ERRORS = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
    OSError,
    StrictDataclassError,
)
"""What transformers raises over a config.json that it cannot use."""


@dataclass(frozen=True, slots=True)
class View:
    """Where a logical linear layer lies in the model's parameters.

    Attributes:
        linear: the layer under its checkpoint name.
        parameter: name of the parameter that holds it.
        rows: its part of that parameter; None when it is the whole of a 2-D one.
        transposed: the parameter holds (in, out).
        stacked: the checkpoint, too, stores it as a slice of a 3-D tensor, so it has no tensor name of its own.
    """

    linear: Linear
    parameter: str
    rows: Rows | None
    transposed: bool
    stacked: bool = False

    def of(self, parameter: Tensor) -> Tensor:
        """Return the layer's (out, in) view of its parameter."""
        part = parameter
        if self.rows is not None:
            part = part if self.rows.expert is None else part[self.rows.expert]
            part = part[self.rows.start : self.rows.stop] if not self.transposed else part
        return part.T if self.transposed else part

    def address(self, parameter: Tensor) -> int:
        """Return where the operand of the layer's product begins: its parameter, or an expert's part of it."""
        expert = None if self.rows is None else self.rows.expert
        return (parameter if expert is None else parameter[expert]).data_ptr()


@dataclass(frozen=True, slots=True)
class BlockSite:
    """A repeated block of the skeleton.

    Attributes:
        name: the module's path.
        module: the module.
        parameters: names of its parameters.
        views: its linear layers.
        attention: path of the module that keeps keys and values; None when there is none, or more than one.
    """

    name: str
    module: nn.Module
    parameters: tuple[str, ...]
    views: tuple[View, ...]
    attention: str | None


class Skeleton:
    """A transformers model whose parameters live on the meta device until they are loaded.

    Attributes:
        model: the module tree.
        stacks: the lists of repeated blocks, in the order of the module tree (an encoder before its decoder).
        inputs: the layers whose inputs are rounded while the model computes, by checkpoint name, and how.
        caches: the attention modules whose keys and values are rounded, by path, and how.
        compute_plainly: ends the rounding of activations, for those that trace the model.

    Args:
        location: the model's folder.
        checkpoint: its tensors.
        untied: give the head a weight of its own, whatever config.json says.
    """

    def __init__(self, location: Location, checkpoint: Checkpoint, *, untied: bool = False) -> None:
        self.config = load_config(location)
        if untied:
            self.config.tie_word_embeddings = False
        self.model = empty_model(self.config, location, checkpoint)
        self.naming = Naming(self.model, checkpoint)
        if location.sentence is not None:
            pool_sentences(self.model, location.sentence)
        self._aliases = _aliases(self.model)
        self.stacks = self._find_stacks()
        inside = {name for stack in self.stacks for site in stack for name in site.parameters}
        self.outside = tuple(name for name, _ in self.model.named_parameters() if name not in inside)
        self.inputs: dict[str, QuantizedInput] = {}
        self.caches: dict[str, QuantizedCache] = {}
        self.compute_plainly = round_activations_of(self)

    @property
    def sites(self) -> list[BlockSite]:
        """All blocks of all stacks."""
        return [site for stack in self.stacks for site in stack]

    @property
    def has_decoder(self) -> bool:
        """Whether the model reads a text with its encoder and another with its decoder."""
        return bool(self.config.is_encoder_decoder) and "decoder_input_ids" in signature(self.model.forward).parameters

    def checkpoint_name(self, name: str) -> str | None:
        """Return the checkpoint tensor that a parameter is read from as it is; None when it is made of several."""
        target = self._target(name)
        binding = None if target is None else self.naming.of_target[target]
        return binding.sources[0][0] if binding is not None and binding.converter is None else None

    def parameter(self, name: str) -> Tensor:
        """Return the current tensor of a parameter."""
        return self.model.get_parameter(name)

    def load(self, names: Iterable[str], read: Callable[[str], Tensor], *, widen: bool = True) -> None:
        """Put the parameters called `names` into memory.

        Args:
            names: parameter names.
            read: gives a checkpoint tensor by name.
            widen: as float32, rather than in the dtype they are stored in.
        """
        targets = [target for name in names if (target := self._target(name)) is not None]
        for name, tensor in self.naming.load(targets, read):
            self._set(name, tensor.to(torch.float32) if widen else tensor)

    def unload(self, names: Iterable[str]) -> None:
        """Send the parameters called `names` back to the meta device, freeing their memory."""
        for name in names:
            self._set(name, torch.empty_like(self.parameter(name), device="meta"))
        trim()

    def aliases(self, name: str) -> list[str]:
        """Return the names of all parameters that are tied to parameter `name`, it among them."""
        return self._aliases.get(name, [name])

    def canonical(self, name: str) -> str:
        """Return the name by which tied parameters are told apart from others: the first of their aliases."""
        return self._aliases.get(name, [name])[0]

    def untied_copies(self) -> dict[str, str]:
        """Return the tensors that the checkpoint lacks because parameters are tied, and the one each is tied to."""
        missing = [name for name in self._aliases if name not in self.naming.of_target]
        found = {name: self.checkpoint_name(name) for name in missing if self.canonical(name) in self.outside}
        return {name: source for name, source in found.items() if source is not None}

    def sources(self, name: str) -> dict[str, bool] | None:
        """Return the checkpoint tensors that a matrix is made of, and whether each lies as (in, out).

        Returns:
            None when a tensor does not lie in the parameter row by row, so that nobody can tell which way round it is.
        """
        target = self._target(name)
        if target is None:
            return None
        binding = self.naming.of_target[target]
        if binding.converter is not None and self.naming.rows_of(target) is None:
            return None
        transposed = is_transposed(self.model.get_submodule(target.rpartition(".")[0]))
        return {source: transposed for source, _ in binding.sources}

    def _target(self, name: str) -> str | None:
        """Return the alias of `name` that the checkpoint holds; None for one that is rightly missing."""
        return next((alias for alias in self._aliases.get(name, [name]) if alias in self.naming.of_target), None)

    def _set(self, name: str, tensor: Tensor) -> None:
        parameters = dict.fromkeys(self._aliases.get(name, [name]))
        value = nn.Parameter(tensor, requires_grad=False)
        for alias in parameters:
            path, _, leaf = alias.rpartition(".")
            module = self.model.get_submodule(path)
            if leaf in module._parameters:
                module._parameters[leaf] = value
            else:
                module._buffers[leaf] = tensor

    def _find_stacks(self) -> list[list[BlockSite]]:
        lists: list[tuple[str, nn.ModuleList]] = []
        for path, module in self.model.named_modules():
            nested = any(path.startswith(f"{outer}.") for outer, _ in lists)
            if isinstance(module, nn.ModuleList) and len(module) and not nested:
                lists.append((path, module))
        stacks = [
            [self._site(f"{path}.{index}", block) for index, block in enumerate(blocks)] for path, blocks in lists
        ]
        stacks = [stack for stack in stacks if any(site.views for site in stack)]
        if not stacks:
            raise LlmoptError(
                f"no repeated blocks found in {type(self.model).__name__}",
                hint="only models made of a list of alike blocks can be worked on block by block",
            )
        return stacks

    def _site(self, path: str, block: nn.Module) -> BlockSite:
        parameters: list[str] = []
        views: list[View] = []
        experts = {_stack_height(module) for module in block.modules()} - {0}
        for sub, module in block.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                name = f"{path}.{sub}.{key}" if sub else f"{path}.{key}"
                parameters.append(name)
                is_router = parameter.ndim == 2 and parameter.shape[0] in experts
                if _is_product(module, key, parameter) and not is_router:
                    views += self._views(name, module, parameter)
        return BlockSite(path, block, tuple(parameters), tuple(views), _attention(path, block))

    def _views(self, name: str, module: nn.Module, parameter: Tensor) -> list[View]:
        binding = self.naming.of_target.get(name)
        if binding is None:
            return []
        transposed = is_transposed(module)
        if binding.converter is None:
            source = binding.sources[0][0].removesuffix(".weight")
            if parameter.ndim == 2:
                return [View(_linear(source, parameter, transposed), name, None, transposed)]
            return [
                View(_linear(f"{source}.{expert}", parameter[expert], transposed), name, rows, transposed, stacked=True)
                for expert in range(parameter.shape[0])
                for rows in [Rows(expert, 0, parameter.shape[1])]
            ]
        located = self.naming.rows_of(name)
        if located is None or transposed:
            return []
        return [
            View(Linear(key.removesuffix(".weight"), rows.stop - rows.start, parameter.shape[-1]), name, rows, False)
            for key, rows in located.items()
        ]


def _attention(path: str, block: nn.Module) -> str | None:
    """Return the path of a block's attention: the outermost module called so that holds matrices."""
    found: list[str] = []
    for sub, module in block.named_modules():
        named = "attention" in type(module).__name__.lower() and any(one.ndim == 2 for one in module.parameters())
        if named and not any(f"{path}.{sub}".startswith(f"{outer}.") for outer in found):
            found.append(f"{path}.{sub}")
    return found[0] if len(found) == 1 else None


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module holds its matrices as (in, out)."""
    return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))


def _linear(name: str, matrix: Tensor, transposed: bool) -> Linear:
    rows, columns = matrix.shape
    return Linear(name, columns, rows) if transposed else Linear(name, rows, columns)


def _stack_height(module: nn.Module) -> int:
    """Return the number of experts a module holds as one 3-D parameter, 0 for any other module."""
    for key, parameter in module.named_parameters(recurse=False):
        if _is_product(module, key, parameter) and parameter.ndim == 3:
            return parameter.shape[0]
    return 0


def _is_product(module: nn.Module, key: str, parameter: Tensor) -> bool:
    """Return whether a parameter is the weight of a matrix product: a Linear, a Conv1D, or experts in one tensor."""
    if isinstance(module, nn.Linear | Conv1D):
        return key == "weight" and min(parameter.shape) >= _SMALLEST
    own_code = not type(module).__module__.startswith("torch.nn")
    return own_code and parameter.ndim == 3 and min(parameter.shape[1:]) >= _SMALLEST


def _aliases(model: PreTrainedModel) -> dict[str, list[str]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: group for group in groups.values() if len(group) > 1 for name in group}


def load_config(location: Location) -> Any:
    """Return transformers' config object.

    Raises:
        UsageError: transformers does not know the architecture, or cannot use a value of config.json.
    """
    known = read_config(location.folder).get("model_type") in transformers.CONFIG_MAPPING
    try:
        with quiet():
            return AutoConfig.from_pretrained(
                location.folder, trust_remote_code=location.trust_remote_code, local_files_only=True
            )
    except CONFIG_ERRORS as error:
        if known:
            raise _no_model(location, error) from error
        first = str(error).strip().splitlines()[0]
        raise UsageError(
            f"`{location.source}` has an architecture that transformers {transformers.__version__} does not know",
            where=first[:300],
            hint="check `model_type` in config.json; a model with code of its own needs --trust-remote-code",
        ) from None


def _no_model(location: Location, error: Exception) -> UsageError:
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return UsageError(
        f"config.json of `{location.source}` makes no model",
        where=f"{type(cause).__name__}: {lines[0][:300]}",
        hint="correct config.json, or fetch the model again",
    )


def model_class(config: Any, location: Location) -> Any:
    """Return the model class that config.json names, or that the task needs.

    Raises:
        UsageError: it names none that transformers has.
    """
    name = architecture_for(location, {"architectures": getattr(config, "architectures", None)})
    if location.trust_remote_code and getattr(config, "auto_map", None):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        for reference in config.auto_map.values():
            if str(reference).endswith(f".{name}"):
                return get_class_from_dynamic_module(reference, location.folder)
    found = getattr(transformers, name, None) if name else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise UsageError(
            f"unknown architecture `{name}`" if name else "config.json names no architecture",
            where=f"`architectures` in {location.folder / 'config.json'}",
            hint="name the transformers class of the model there, such as LlamaForCausalLM",
        )
    return found


def empty_model(config: Any, location: Location, checkpoint: Checkpoint) -> PreTrainedModel:
    """Return the model on the meta device, in eval mode.

    A base model whose checkpoint has no pooler does without: transformers would make up its weights.

    Raises:
        UsageError: config.json makes no model.
    """
    if getattr(config, "quantization_config", None):
        raise UsageError(
            f"`{location.source}` is quantized already",
            where=f"quantization_config: {config.quantization_config.get('quant_method')}",
            hint="start from the floating-point model",
        )
    kind = model_class(config, location)
    try:
        with quiet(), init_empty_weights(include_buffers=False), no_init_weights():
            model: PreTrainedModel = kind._from_config(config, dtype=torch.float32)
    except CONFIG_ERRORS as error:
        raise _no_model(location, error) from error
    if not any("pooler." in name for name in checkpoint.tensors):
        drop_pooler(model)
    model.tie_weights()
    if _chooses_experts(model):
        model.set_experts_implementation("eager")  # one product an expert, so that each can be watched
    model.eval()
    model.requires_grad_(False)
    if getattr(config, "use_cache", None):
        config.use_cache = False
    return model


def own_experts_choice(model: PreTrainedModel) -> None:
    """Let transformers choose again how experts are multiplied: a loop over experts cannot be traced."""
    if _chooses_experts(model):
        model.set_experts_implementation(None)  # pyright: ignore[reportArgumentType]


def _chooses_experts(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "_can_set_experts_implementation", lambda: False)())


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own warnings and progress bars off the terminal."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    root_level = logging.getLogger().level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        logging.getLogger().setLevel(root_level)
        if bars:
            hf_logging.enable_progress_bar()
