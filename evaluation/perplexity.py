"""Perplexity, and divergence from a reference, over windows of text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .parity import log_softmax

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class Scores:
    """Sums over windows. A window counts as one sample for standard errors: its tokens are not independent.

    Attributes:
        losses: mean negative log-likelihood of each window's predicted tokens, nats.
        tokens: number of predicted tokens in each window.
        divergences: mean KL(reference || this) of each window, nats; empty without a reference.
        agreements: share of positions of each window where both put the same token first.
        reference_losses: the reference's losses, for paired differences.
    """

    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)
    reference_losses: list[float] = field(default_factory=list)

    def add(self, ids: Array, logits: Array, reference: Array | None = None) -> None:
        """Score windows of one length.

        Args:
            ids: (windows, length) token ids; every token but the first is predicted.
            logits: (windows, length, vocabulary).
            reference: logits of the model to compare with, same shape.
        """
        for row in range(ids.shape[0]):
            logs = log_softmax(logits[row, :-1])
            self.losses.append(_loss(logs, ids[row]))
            self.tokens.append(ids.shape[1] - 1)
            if reference is not None:
                self._add_reference(ids[row], logs, log_softmax(reference[row, :-1]))

    def _add_reference(self, ids: Array, logs: Array, expected: Array) -> None:
        import numpy as np

        self.reference_losses.append(_loss(expected, ids))
        self.divergences.append(float((np.exp(expected) * (expected - logs)).sum(-1).mean()))
        self.agreements.append(float((expected.argmax(-1) == logs.argmax(-1)).mean()))

    def report(self) -> dict[str, Any]:
        """Return perplexity and, where there was a reference, its figures; standard errors are over windows."""
        loss = _mean(self.losses, self.tokens)
        figures: dict[str, Any] = {
            "perplexity": math.exp(loss),
            "loss_nats": loss,
            "loss_stderr_nats": _stderr(self.losses),
            "windows": len(self.losses),
            "tokens": sum(self.tokens),
        }
        if self.divergences:
            base = _mean(self.reference_losses, self.tokens)
            paired = [one - other for one, other in zip(self.losses, self.reference_losses, strict=True)]
            figures["source"] = {
                "perplexity": math.exp(base),
                "perplexity_increase_share": math.exp(loss - base) - 1,
                "loss_increase_nats": loss - base,
                "loss_increase_stderr_nats": _stderr(paired),
                "mean_kl_nats": _mean(self.divergences, self.tokens),
                "mean_kl_stderr_nats": _stderr(self.divergences),
                "top1_agreement": _mean(self.agreements, self.tokens),
            }
        return figures


def _loss(logs: Array, ids: Array) -> float:
    import numpy as np

    return float(-np.take_along_axis(logs, ids[1:, None], -1).mean())


def _mean(values: list[float], weights: list[int]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def _stderr(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))
