"""A model's outline from config.json and shard headers: enough for a plan, without torch.

Which tensors are linear layers of repeated blocks is told by structure alone: a block list is a numbered level in the
tensor names (`model.layers.7.`); a linear layer is a matrix `….weight` that most entries of the list have. A bias tells
which way round the matrix lies: GPT-2's Conv1D stores (in, out), so its bias has the length of the second axis.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from ..core.facts import LinearFacts, ModelFacts
from .checkpoint import Checkpoint, TensorInfo
from .locate import Location, read_config
from .tasks import architecture_for

_TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "tokenizer_config.json"}
)
_SMALLEST = 16
"""A matrix narrower than this is a table (relative positions), no layer worth quantizing."""


def outline(location: Location, checkpoint: Checkpoint) -> ModelFacts:
    """Return what config.json and the shard headers tell; config.json as it will be written, with the task's class."""
    config = read_config(location.folder)
    tensors = checkpoint.tensors
    stacks = block_lists(tensors)
    per_block: Counter[str] = Counter()
    for name, info in tensors.items():
        block = block_of(name, stacks)
        if block is not None:
            per_block[block] += info.nbytes
    dtypes: Counter[str] = Counter()
    for info in tensors.values():
        dtypes[info.dtype] += info.nbytes
    architecture = architecture_for(location, config)
    if architecture:
        config = {**config, "architectures": [architecture]}
    return ModelFacts(
        source=location.source,
        model_type=str(config.get("model_type", "")),
        architecture=architecture,
        dtype=dtypes.most_common(1)[0][0],
        parameters=sum(info.nbytes // _width(info) for info in tensors.values()),
        bytes=checkpoint.nbytes,
        largest_block_bytes=max(per_block.values(), default=0),
        outside_bytes=checkpoint.nbytes - sum(per_block.values()),
        blocks=len(per_block),
        linears=tuple(_linears(tensors, stacks)),
        has_tokenizer=has_tokenizer(location.folder),
        config=config,
        biased_norms=tuple(_biased_norms(tensors, stacks)),
        has_fast_tokenizer=(location.folder / "tokenizer.json").is_file(),
    )


def has_tokenizer(folder: Path) -> bool:
    """Return whether tokenizer files lie in `folder`."""
    return any((folder / file).is_file() for file in _TOKENIZER_FILES)


def block_lists(tensors: dict[str, TensorInfo]) -> tuple[str, ...]:
    """Return the prefixes of the block lists: the outermost numbered levels, such as `model.layers`."""
    found = {match[1] for name in tensors if (match := re.match(r"(.*?[A-Za-z_]\w*)\.\d+\.", name))}
    return tuple(sorted(found))


def block_of(name: str, stacks: tuple[str, ...]) -> str | None:
    """Return the block that tensor `name` belongs to (`model.layers.3`), None if it lies outside."""
    match = re.match(r"(.*?[A-Za-z_]\w*)\.(\d+)\.", name)
    return f"{match[1]}.{match[2]}" if match and match[1] in stacks else None


def _width(info: TensorInfo) -> int:
    count = 1
    for size in info.shape:
        count *= size
    return max(1, info.nbytes // max(1, count))


def _linears(tensors: dict[str, TensorInfo], stacks: tuple[str, ...]) -> list[LinearFacts]:
    owners: defaultdict[str, set[str]] = defaultdict(set)
    sizes: defaultdict[str, set[str]] = defaultdict(set)
    candidates: list[tuple[str, str, TensorInfo]] = []
    for name, info in tensors.items():
        block = block_of(name, stacks)
        if block is None:
            continue
        stack = block.rpartition(".")[0]
        sizes[stack].add(block)
        if name.endswith(".weight") and len(info.shape) == 2 and min(info.shape) >= _SMALLEST and not _is_table(name):
            role = f"{stack}.*{name[len(block) :]}"
            owners[role].add(block)
            candidates.append((role, name.removesuffix(".weight"), info))
    linears: list[LinearFacts] = []
    experts = _expert_counts(tensors)
    turned = {
        role.partition(".*.")[0] for role, name, info in candidates if _lies(tensors, name, info) == (False, True)
    }
    for role, name, info in candidates:
        stack = role.partition(".*.")[0]
        is_router = info.shape[0] == experts.get(name.rpartition(".")[0])
        if info.is_floating and not is_router and 2 * len(owners[role]) > len(sizes[stack]):
            rows, columns = info.shape
            by_rows, by_columns = _lies(tensors, name, info)
            # A square matrix does not tell; it lies as the other layers of its stack do.
            transposed = by_columns and (not by_rows or stack in turned)
            out_features, in_features = (columns, rows) if transposed else (rows, columns)
            linears.append(
                LinearFacts(name=name, out_features=out_features, in_features=in_features, transposed=transposed)
            )
    return linears


def _biased_norms(tensors: dict[str, TensorInfo], stacks: tuple[str, ...]) -> Iterator[str]:
    """Yield the modules of the blocks that have a vector for a weight, and one for a bias."""
    for name, info in tensors.items():
        module = name.removesuffix(".weight")
        bias = tensors.get(f"{module}.bias")
        vector = len(info.shape) == 1 and bias is not None and bias.shape == info.shape
        if name != module and vector and block_of(name, stacks) is not None:
            yield module


def _lies(tensors: dict[str, TensorInfo], name: str, info: TensorInfo) -> tuple[bool, bool]:
    """Return whether the bias of a layer has the length of the rows, and of the columns, of its matrix."""
    bias = tensors.get(f"{name}.bias")
    return (False, False) if bias is None else (bias.shape == info.shape[:1], bias.shape == info.shape[1:])


def _is_table(name: str) -> bool:
    """Return whether a matrix is looked up, not multiplied: T5's relative positions, an embedding."""
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    return "embed" in leaf or "bias" in leaf


def _expert_counts(tensors: dict[str, TensorInfo]) -> dict[str, int]:
    """Return how many experts each mixture has, by the module that holds them (`model.layers.0.mlp`).

    The matrix beside them with a row for each is the router, whose rounding would send tokens elsewhere.
    """
    counts: dict[str, int] = {}
    for name, info in tensors.items():
        parent, found, rest = name.partition(".experts.")
        if not found:
            continue
        number = rest.partition(".")[0]
        count = int(number) + 1 if number.isdigit() else info.shape[0] if len(info.shape) == 3 else 0
        counts[parent] = max(counts.get(parent, 0), count)
    return counts
