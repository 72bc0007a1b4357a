"""The teacher's answers to a batch, computed or read from a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .taps import Taps, attention_parts, blocks_of

if TYPE_CHECKING:
    from .logit_cache import LogitCache
    from .order import Batch

PARTS = ("queries", "keys", "values")


class Teacher:
    """A model that answers and does not learn.

    Args:
        load: puts it into memory; called when it is first asked something that no cache knows.
        losses: names of the losses, which say what is asked of it.
        ids: its token id for each of the student's, None where both are the same.
        shared: the student's ids that it knows, None where it knows all.
        device: where it computes.
        causal: whether it predicts the next token, and so needs no mask where nothing is padded.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        losses: frozenset[str],
        *,
        ids: Tensor | None,
        shared: Tensor | None,
        device: torch.device,
        causal: bool,
    ) -> None:
        self._load, self._losses, self._device, self._causal = load, losses, device, causal
        self._ids, self._shared = ids, shared
        self._columns = None if ids is None or shared is None else ids[shared]
        self._model: Any = None
        self._taps = Taps({})

    @property
    def model(self) -> Any:
        """The model, in memory from now on."""
        if self._model is None:
            self._model = self._load().to(self._device)
            self._taps = Taps(modules_to_watch(self._model, self._losses))
        return self._model

    def answer(self, batch: Batch, cache: LogitCache | None = None) -> dict[str, Tensor]:
        """Return what the losses compare with, on the device.

        Args:
            batch: rows of the student's token ids.
            cache: of the rows that the batch's numbers speak of.
        """
        if cache is not None:
            if not cache.holds(batch.rows):
                cache.put(batch, self._compute(batch)["logits"])
            return {name: tensor.to(self._device) for name, tensor in cache.get(batch).items()}
        return self._compute(batch)

    @torch.no_grad()
    def _compute(self, batch: Batch) -> dict[str, Tensor]:
        model = self.model
        ids = batch.ids if self._ids is None else self._ids[batch.ids].clamp_min(0)
        inputs = model_inputs(ids.to(self._device), batch.mask.to(self._device), full=batch.full and self._causal)
        with self._taps.listening():
            made = model(**inputs, return_dict=True)
        answers = self._taps.take()
        if "logits" in made and self._losses & {"kl", "reverse_kl", "js"}:
            answers["logits"] = made.logits if self._columns is None else made.logits[..., self._columns]
        if "cosine" in self._losses:
            answers["embedding"] = made.sentence_embedding
        return answers


def model_inputs(ids: Tensor, mask: Tensor, *, full: bool) -> dict[str, Tensor]:
    """Return a model's inputs; without padding a causal model needs no mask, and computes faster without."""
    return {"input_ids": ids} if full else {"input_ids": ids, "attention_mask": mask.long()}


def modules_to_watch(model: Any, losses: frozenset[str], blocks: Sequence[int] | None = None) -> dict[str, Any]:
    """Return the modules whose outputs losses compare: blocks by number, and the parts of the last attention.

    Args:
        model: a transformers model.
        losses: names of losses.
        blocks: numbers of the blocks whose states are compared; all when None.
    """
    watched: dict[str, Any] = {}
    found = blocks_of(model) if losses & {"hidden", "relation"} else []
    if "hidden" in losses:
        watched |= {f"state.{index}": found[index] for index in (range(len(found)) if blocks is None else blocks)}
    if "relation" in losses:
        watched |= dict(zip(PARTS, attention_parts(found[-1]), strict=True))
    return watched
