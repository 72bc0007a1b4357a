"""How much a block changes what runs through it.

Men, Xu, Zhang, Wang, Lin, Lu, Han and Chen (2024), "ShortGPT: Layers in Large Language Models are More Redundant Than
You Expect": Block Influence is 1 - the mean over tokens of the cosine between a token's hidden state before the block
and after it.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity


class Influence:
    """Gathers Block Influence over batches."""

    def __init__(self) -> None:
        self._total = 0.0
        self._tokens = 0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Add hidden states before and after the block, (…, hidden) each."""
        cosines = cosine_similarity(before.flatten(0, -2).float(), after.flatten(0, -2).float(), dim=-1)
        self._total += float((1 - cosines.double()).sum())
        self._tokens += cosines.numel()

    @property
    def mean(self) -> float:
        """1 - the mean cosine, from 0 to 2; 0 before any token."""
        return self._total / self._tokens if self._tokens else 0.0
