"""The student with its losses as one module, so that whatever wraps it for several processes sees every parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...core.errors import UsageError
from .losses import answer_tokens, cosine_distance, divergence, next_token, of_logs, relation, state_error, with_rest
from .taps import Taps, blocks_of, matched
from .teacher import PARTS, model_inputs, modules_to_watch

if TYPE_CHECKING:
    from .losses import Divergence
    from .order import Counts

DIVERGENCES: tuple[Divergence, ...] = ("kl", "reverse_kl", "js")


class Pupil(nn.Module):
    """A student and what it is measured by.

    Args:
        student: a transformers model.
        losses: names of losses.
        temperature: of the divergences.
        shared: the student's token ids that the teacher knows, None where it knows all.
        causal: whether it predicts the next token.
        heads: relation heads.
    """

    def __init__(
        self,
        student: nn.Module,
        losses: frozenset[str],
        *,
        temperature: float,
        shared: Tensor | None,
        causal: bool,
        heads: int,
    ) -> None:
        super().__init__()
        self.student = student
        self.projections = nn.ModuleDict()
        self._losses, self._temperature, self._causal, self._heads = losses, temperature, causal, heads
        self._shared = shared
        self._pairs: list[tuple[int, int]] = []
        self._taps = Taps({})

    def meet(self, teacher: nn.Module | None) -> None:
        """Make the projections between states of different width, and choose which blocks are compared."""
        if "hidden" in self._losses and teacher is not None:
            ours, theirs = blocks_of(self.student), blocks_of(teacher)
            self._pairs = matched(len(ours), len(theirs))
            mine, other = _width(self.student), _width(teacher)
            if mine != other:
                for index, _ in self._pairs:
                    self.projections[str(index)] = nn.Linear(mine, other, bias=False)
        if "relation" in self._losses and teacher is not None:
            for model in (self.student, teacher):
                if _width(model) % self._heads:
                    raise UsageError(
                        f"{self._heads} relation heads do not divide a width of {_width(model)}",
                        where="pass `distill`",
                        hint="choose another number with `relation_heads`",
                    )
        self._taps = Taps(modules_to_watch(self.student, self._losses))

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        answers: dict[str, Tensor],
        *,
        counts: Counts,
        names: tuple[str, ...],
        full: bool = False,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Return the losses called `names`, each divided by the units that `counts` has of it, (losses,) float32.

        Args:
            ids: (batch, sequence) token ids.
            mask: (batch, sequence), 1 where a token is real.
            answers: the teacher's; see `Teacher.answer`.
            counts: of all rows that make up the step.
            names: of losses; `lm` may be asked for although it is not learnt from.
            full: whether nothing is padded.
            labels: (batch,) classes, or places where answers begin; needed by the loss `labels`.
        """
        with self._taps.listening():
            made = self.student(**model_inputs(ids, mask, full=full and self._causal), return_dict=True)
        answers = {**answers, **{f"ours.{name}": seen for name, seen in self._taps.take().items()}}
        if labels is not None:
            answers = {**answers, "labels": labels}
        return torch.stack([self._loss(name, made, ids, mask, answers=answers, counts=counts) for name in names])

    def _loss(
        self, name: str, made: Any, ids: Tensor, mask: Tensor, *, answers: dict[str, Tensor], counts: Counts
    ) -> Tensor:
        if name in DIVERGENCES:
            return self._divergence(name, made.logits, mask, answers, counts)
        if name == "lm":
            return next_token(made.logits, ids, mask) / counts.predicted
        if name == "labels" and self._causal:
            return answer_tokens(made.logits, ids, mask, answers["labels"]) / counts.answers
        if name == "labels":
            return functional.cross_entropy(made.logits.float(), answers["labels"], reduction="sum") / counts.texts
        if name == "cosine":
            ours, theirs = made.sentence_embedding, answers["embedding"]
            if ours.shape != theirs.shape:
                raise UsageError(
                    f"embeddings of {ours.shape[-1]} numbers cannot be compared with those of {theirs.shape[-1]}",
                    where="pass `distill`, loss `cosine`",
                    hint="use `hidden` or `relation`, which compare models of different width",
                )
            return cosine_distance(ours, theirs) / counts.texts
        if name == "relation":
            parts = [relation(answers[f"ours.{part}"], answers[part], mask, self._heads) for part in PARTS]
            return torch.stack(parts).mean() / counts.tokens
        errors: list[Tensor] = []
        for own, other in self._pairs:
            state = answers[f"ours.state.{own}"]
            projected = self.projections[str(own)](state) if len(self.projections) else state
            errors.append(state_error(projected, answers[f"state.{other}"], mask))
        return torch.stack(errors).mean() / counts.tokens

    def _divergence(
        self, kind: Divergence, logits: Tensor, mask: Tensor, answers: dict[str, Tensor], counts: Counts
    ) -> Tensor:
        if self._shared is not None:
            logits = logits[..., self._shared]
        if "top_ids" in answers:
            logs = torch.log_softmax(logits.float() / self._temperature, -1).gather(-1, answers["top_ids"])
            made = of_logs(kind, with_rest(logs), with_rest(answers["top_logs"])) * self._temperature**2
        else:
            theirs = answers["logits"]
            width = min(logits.shape[-1], theirs.shape[-1])  # some tables are filled up to a round number of tokens
            if logits.ndim == 2 and logits.shape != theirs.shape:
                raise UsageError(
                    f"the student tells {logits.shape[-1]} classes apart, the teacher {theirs.shape[-1]}",
                    where="pass `distill`",
                    hint="use a teacher with the same classes",
                )
            made = divergence(kind, logits[..., :width], theirs[..., :width], self._temperature)
        if made.ndim == 1:
            return made.sum() / counts.texts
        return (made * mask).sum() / counts.tokens


def _width(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)
