"""The folder of an adapter that peft, vLLM and TGI load beside its base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.adapter import CONFIG, WEIGHTS
from ..core.errors import LlmoptError

if TYPE_CHECKING:
    from torch import Tensor


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter and read it again.

    Args:
        folder: where to; exists.
        tensors: under PEFT's names.
        config: adapter_config.json.

    Raises:
        LlmoptError: what was read is not what was written.
    """
    from safetensors.torch import save_file

    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(dict(tensors), folder / WEIGHTS, {"format": "pt"})
    if not same_adapter(folder, tensors, config):
        raise LlmoptError(
            f"`{folder / WEIGHTS}` does not hold what was written", hint="check the disk, and run it again"
        )


def same_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    """Return whether a folder holds these tensors, bit for bit, no others, and this adapter_config.json."""
    from safetensors.torch import load_file

    found = load_file(folder / WEIGHTS)
    return (
        json.loads((folder / CONFIG).read_text(encoding="utf-8")) == config
        and found.keys() == tensors.keys()
        and all(found[name].dtype == tensor.dtype and found[name].equal(tensor) for name, tensor in tensors.items())
    )
