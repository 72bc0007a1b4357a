"""Randomized Hadamard rotations of any width.

A Hadamard matrix has entries of one magnitude, so multiplying by it spreads an outlier evenly over all channels
(Ashkboos et al., 2024, QuaRot; Liu et al., 2024, SpinQuant). Their sizes are powers of two and some multiples of four;
a width is split into factors that there are matrices for, and the rotation is the Kronecker product of these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LARGEST_FACTOR = 64
"""Powers of two are multiplied in factors up to this size: two small products cost less than a large one."""


class Rotation:
    """The orthogonal matrix `diag(signs) (F1 ⊗ F2 ⊗ …)` with random signs.

    Args:
        width: number of channels.
        seed: of the signs, and of a random orthogonal factor where the width has no Hadamard matrix.
    """

    def __init__(self, width: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
        self._factors = factors(width, generator)

    @property
    def width(self) -> int:
        """Number of channels."""
        return len(self._signs)

    def turn(self, rows: Tensor) -> Tensor:
        """Return `rows @ Q`, (…, width) float64."""
        made = rows.double() * self._signs
        inner = self.width
        for factor in self._factors:
            inner //= len(factor)
            made = factor.T @ made.reshape(-1, len(factor), inner)
        return made.reshape(rows.shape)


def factors(width: int, generator: torch.Generator) -> list[Tensor]:
    """Return orthogonal matrices whose sizes multiply to `width`, Hadamard matrices over √n wherever there are any.

    1. An odd width, or a width whose odd part has no such matrix: a random orthogonal one for the odd part.
    2. Four times the odd part, by Paley's construction, where it exists and divides the width.
    3. What is left is a power of two: Sylvester's.
    """
    twos = width & -width
    odd = width // twos
    found: list[Tensor] = []
    if odd > 1:
        small = paley(4 * odd) if twos >= 4 else None
        twos = twos if small is None else twos // 4
        found.append(random_orthogonal(odd, generator) if small is None else small / len(small) ** 0.5)
    while twos > 1:
        size = min(twos, _LARGEST_FACTOR)
        found.append(sylvester(size) / size**0.5)
        twos //= size
    return found


def sylvester(size: int) -> Tensor:
    """Return the Hadamard matrix of a power of two, entries ±1 (Sylvester, 1867)."""
    made = torch.ones(1, 1, dtype=torch.float64)
    while len(made) < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made


def paley(size: int) -> Tensor | None:
    """Return a Hadamard matrix, entries ±1, from the quadratic residues of a prime (Paley, 1933); None without one.

    1. q = size - 1 is a prime with q = 3 mod 4: I + S.
    2. q = size / 2 - 1 is a prime with q = 1 mod 4: S ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]].

    S is the Jacobsthal matrix of q with a border of ones.
    """
    if _is_prime(size - 1) and size % 4 == 0:
        return torch.eye(size, dtype=torch.float64) + _bordered(size - 1, -1.0)
    half = size // 2
    if size % 2 == 0 and half % 4 == 2 and _is_prime(half - 1):
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        cross = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(half - 1, 1.0), plus) + torch.kron(torch.eye(half, dtype=torch.float64), cross)
    return None


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix, uniformly distributed (Mezzadri, 2007)."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return q * torch.sign(torch.diagonal(r))


def _bordered(prime: int, left: float) -> Tensor:
    """Return the Jacobsthal matrix χ(i - j) with a row of ones above and a column of `left` beside it."""
    residues = {number * number % prime for number in range(1, prime)}
    chi: Sequence[float] = [0.0, *(1.0 if number in residues else -1.0 for number in range(1, prime))]
    numbers = torch.arange(prime)
    made = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    made[1:, 1:] = torch.tensor(chi, dtype=torch.float64)[(numbers.unsqueeze(1) - numbers) % prime]
    made[0, 1:], made[1:, 0] = 1.0, left
    return made


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
