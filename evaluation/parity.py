"""How near two forms of one model are: differences of outputs, and of the distributions that logits stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.manifest import Parity

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Limits of a comparison; None leaves a figure unlimited.

    Attributes:
        max_difference: largest absolute difference of an output, as a share of the largest reference value where that
            is above 1.
        mean_kl: mean Kullback-Leibler divergence, nats a position.
        mean_cosine_distance: mean of 1 - cosine of two output vectors.
    """

    max_difference: float | None = None
    mean_kl: float | None = None
    mean_cosine_distance: float | None = None

    def to_dict(self) -> dict[str, float]:
        """Render the limits that are set."""
        named = {name: getattr(self, name) for name in ("max_difference", "mean_kl", "mean_cosine_distance")}
        return {name: value for name, value in named.items() if value is not None}


class Comparison:
    """Accumulates the differences of batches of outputs."""

    def __init__(self) -> None:
        self.positions = 0
        self.largest = 0.0
        self.scale = 1.0
        self.finite = True
        self._kl = 0.0
        self._agree = 0
        self._logits = 0
        self._cosine = 0.0
        self._vectors = 0

    def add(self, reference: Mapping[str, Array], other: Mapping[str, Array]) -> None:
        """Compare one batch.

        Args:
            reference: outputs by name, from the model that was exported.
            other: those of the artifact; every name it shares with the reference is compared.
        """
        shared = [name for name in reference if name in other]
        for name in shared:
            if reference[name].shape != other[name].shape:
                raise ValueError(f"{name}: {reference[name].shape} against {other[name].shape}")
            # Row by row: the logits of a large vocabulary are not copied to float64 all at once.
            for expected, got in zip(reference[name], other[name], strict=True):
                self._add_row(expected, got)
                if name == "logits":
                    self._add_logits(expected, got)
        if shared and "logits" not in shared:
            self.positions += int(reference[shared[0]].shape[0])

    def _add_row(self, expected: Array, got: Array) -> None:
        import numpy as np

        self.finite &= bool(np.isfinite(got).all())
        self.largest = max(self.largest, float(np.abs(expected - got).max(initial=0)))
        self.scale = max(self.scale, float(np.abs(expected).max(initial=0)))
        distances = cosine_distance(expected, got)
        self._cosine += float(distances.sum())
        self._vectors += distances.size

    def _add_logits(self, expected: Array, got: Array) -> None:
        expected, got = expected.reshape(-1, expected.shape[-1]), got.reshape(-1, got.shape[-1])
        self._kl += float(kl_divergence(expected, got).sum())
        self._agree += int((expected.argmax(-1) == got.argmax(-1)).sum())
        self._logits += expected.shape[0]
        self.positions += expected.shape[0]

    def result(self, *, runtime: str, samples: str, weights_equal: bool | None, tolerance: Tolerance) -> Parity:
        """Return the figures and whether all are within `tolerance`."""
        kl = self._kl / self._logits if self._logits else None
        passed = self.finite and self.positions > 0 and weights_equal is not False
        if tolerance.max_difference is not None:
            passed &= self.largest <= tolerance.max_difference * self.scale
        if tolerance.mean_kl is not None and kl is not None:
            passed &= kl <= tolerance.mean_kl
        cosine = max(self._cosine / self._vectors, 0.0) if self._vectors else None  # rounding makes -1e-17 of 0
        if tolerance.mean_cosine_distance is not None and cosine is not None:
            passed &= cosine <= tolerance.mean_cosine_distance
        return Parity(
            runtime=runtime,
            samples=samples,
            positions=self.positions,
            weights_equal=weights_equal,
            max_difference=self.largest,
            mean_kl=kl,
            top1_agreement=self._agree / self._logits if self._logits else None,
            mean_cosine_distance=cosine,
            tolerance=tolerance.to_dict(),
            passed=passed,
        )


def cosine_distance(reference: Array, other: Array) -> Array:
    """Return 1 - cosine of vectors along the last axis; 0 where both are zero, which is how padding is compared."""
    import numpy as np

    if reference.ndim == 0:
        return np.zeros(0)
    first, second = reference.astype(np.float64), other.astype(np.float64)
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    products = (first * second).sum(-1)
    return np.where(
        (norms == 0) & (first == second).all(-1), 0.0, 1 - products / np.where(norms == 0, np.inf, norms)
    ).ravel()


def log_softmax(logits: Array) -> Array:
    """Return log probabilities over the last axis, float64."""
    import numpy as np

    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl_divergence(reference: Array, other: Array) -> Array:
    """Return KL(reference || other) of two sets of logits, (positions, vocabulary), in nats a position."""
    import numpy as np

    expected = log_softmax(reference)
    return (np.exp(expected) * (expected - log_softmax(other))).sum(-1)
