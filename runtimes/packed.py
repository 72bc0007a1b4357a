"""GPTQ and AWQ checkpoints, opened without the engines they are for: codes are unpacked and multiplied out here.

Written from the formats' descriptions, and shares nothing with the exporters: an artifact that is packed wrongly is
read wrongly. All arithmetic is in float32, rounded once to the dtype of the scales; transformers computes with the
result.

1. GPTQ: `qweight` holds the codes of a column as a stream of bits along the input dimension, `qzeros` the zero points
   along the output dimension, each less one unless `checkpoint_format` is gptq_v2; `g_idx` names the group of an input.
2. AWQ (GEMM): eight codes of a row in a word of `qweight`; its four-bit fields hold the columns 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import LlmoptError
from ..core.runtime import Runtime
from ..core.untrusted import read_json
from .transformers_ import PACKED, TransformersSession, is_model_folder, load, quant_method
from .versions import installed

if TYPE_CHECKING:
    from torch import Tensor

_AWQ_FIELD_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


class PackedCodes(Runtime):
    """llmopt's own reader of GPTQ and AWQ checkpoints, for machines without an engine that reads them."""

    name = "packed-codes"

    def version(self) -> str:
        """Return what reads and what computes."""
        return f"llmopt's reader of packed codes, {installed('transformers')}"

    def opens(self, directory: Path) -> bool:
        """Return whether `directory` is a GPTQ or AWQ folder, as its config.json says."""
        return is_model_folder(directory) and quant_method(directory) in PACKED

    def open(
        self,
        directory: Path,
        *,
        threads: int | None = None,
        parallel: int = 1,  # noqa: ARG002
    ) -> TransformersSession:
        """Unpack the weights and give them to transformers, in float32."""
        return load(directory, threads=threads, weights=lambda: dequantized(directory))


def dequantized(directory: Path) -> dict[str, Tensor]:
    """Return a checkpoint's tensors, packed layers as the weights (out_features, in_features) that they stand for.

    Raises:
        LlmoptError: a layer's parts do not fit together.
    """
    from safetensors import safe_open

    config = read_json(directory / "config.json")["quantization_config"]
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118  (not a dict)
                layer, _, part = key.rpartition(".")
                if part in _PARTS:
                    layers.setdefault(layer, {})[part] = shard.get_tensor(key)
                else:
                    tensors[key] = shard.get_tensor(key)
    read = _awq_weight if config["quant_method"] == "awq" else _gptq_weight
    for layer, parts in layers.items():
        try:
            tensors[f"{layer}.weight"] = read(parts, config)
        except (KeyError, RuntimeError, IndexError) as error:
            raise LlmoptError(f"the parts of `{layer}` do not fit together", where=f"{directory}\n{error!r}") from error
    return tensors


def _gptq_weight(parts: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    import torch

    bits = int(config["bits"])
    codes = _fields(parts["qweight"].T, bits).T  # (in, out)
    zeros = _fields(parts["qzeros"], bits)  # (groups, out)
    if config.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = (zeros + 1) & ((1 << bits) - 1)
    groups = parts.get("g_idx")
    if groups is None:
        groups = torch.arange(len(codes)) // (len(codes) // len(zeros))
    return _weight(codes, zeros[groups.long()], parts["scales"][groups.long()])


def _awq_weight(parts: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    bits = int(config["bits"])
    codes, zeros = (_awq_columns(_fields(parts[part], bits)) for part in ("qweight", "qzeros"))
    width = len(codes) // len(zeros)
    return _weight(codes, zeros.repeat_interleave(width, 0), parts["scales"].repeat_interleave(width, 0))


def _awq_columns(fields: Tensor) -> Tensor:
    return fields.unflatten(1, (-1, 8))[..., list(_AWQ_FIELD_OF_COLUMN)].flatten(1)


def _weight(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    return ((codes - zeros).float() * scales.float()).to(scales.dtype).T.contiguous()


def _fields(words: Tensor, bits: int) -> Tensor:
    """Return the `bits`-wide fields of rows of 32-bit words, lowest bits first, across the words' borders.

    Args:
        words: (rows, words) int32.
        bits: width of a field.

    Returns:
        (rows, words * 32 / bits) int64.
    """
    import torch

    starts = torch.arange(words.shape[1] * 32 // bits) * bits
    word, shift = starts // 32, starts % 32
    unsigned = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    pair = unsigned[:, word] | (unsigned[:, word + 1] << 32)  # 64 bits: a field begins in the lower half
    return (pair >> shift) & ((1 << bits) - 1)
