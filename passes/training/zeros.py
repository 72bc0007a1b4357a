"""Zeros that stay zeros while the weights around them learn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ...core.errors import LlmoptError

if TYPE_CHECKING:
    from ...core.model import ModelHandle


class _Masked:
    """Takes from a gradient what would move a zero: AdamW's moments and its decay then leave it what it is."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask

    def __call__(self, gradient: Tensor) -> Tensor:
        self._mask = self._mask.to(gradient.device)
        return gradient * self._mask


def keep_zeros(student: nn.Module, model: ModelHandle) -> None:
    """Let the zeros of sparse layers stay while a student in memory learns; call it when parameters may learn."""
    for name in model.sparse_parameters():
        parameter = student.get_parameter(name)
        parameter.register_hook(_Masked(parameter.detach() != 0))


def check_zeros(before: ModelHandle, after: ModelHandle) -> None:
    """Look at what was learnt of sparse layers.

    Raises:
        LlmoptError: what was zero is not any more, as where parameters are cut into shards, which loses the masks.
    """
    for layer in before.sparse:
        old, new = (model.read(f"{layer}.weight") for model in (before, after))
        if bool(((old == 0) & (new != 0)).any()):
            raise LlmoptError(
                f"zeros of `{layer}` did not stay zeros",
                where="pass `distill` after `sparsify`",
                hint="let whole copies of the model learn (DDP), not shards (FSDP)",
            )
