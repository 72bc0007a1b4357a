"""Finding rows of weight matrices by their content, so that no exporter needs to know how a graph names things."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the rows of a matrix come from: row `rows[i]` of layer `layers[i]`, both int64 (out,)."""

    layers: Array
    rows: Array


@dataclass(slots=True)
class RowIndex:
    """An index of all rows of many matrices, by a 64-bit hash of their bytes: 16 bytes of memory a row.

    Rows that are equal bit for bit are one entry. A hash that is equal proves nothing: whoever uses what was found
    compares the rows.
    """

    names: list[str] = field(default_factory=list)
    _parts: dict[int, list[tuple[Array, Array, Array]]] = field(default_factory=dict)
    _tables: dict[int, tuple[Array, Array, Array]] = field(default_factory=dict)
    _found: dict[int, Array] = field(default_factory=dict)

    def add(self, name: str, matrix: Array) -> None:
        """Index the rows of a layer, (out, in)."""
        import numpy as np

        rows = np.arange(len(matrix))
        layers = np.full(len(matrix), len(self.names))
        self.names.append(name)
        self._parts.setdefault(matrix.shape[1], []).append((hash_rows(matrix), layers, rows))

    def find(self, matrix: Array) -> Origin | None:
        """Return where each row of `matrix`, (out, in), comes from; None if any row is unknown."""
        import numpy as np

        width = matrix.shape[1]
        if width not in self._parts:
            return None
        hashes, layers, rows = self._table(width)
        wanted = hash_rows(matrix)
        first = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
        if not (hashes[first] == wanted).all():
            return None
        # Mark every layer that holds one of these rows, not only the first.
        self._found[width] |= np.isin(hashes, wanted)
        return Origin(layers[first], rows[first])

    def alike(self, row: Array) -> list[tuple[int, int]]:
        """Return every (layer, row) with the hash of `row`, (in,)."""
        hashes, layers, rows = self._table(len(row))
        wanted = hash_rows(row[None])[0]
        return [(int(layers[at]), int(rows[at])) for at in (hashes == wanted).nonzero()[0]]

    def missing(self) -> list[str]:
        """Return the names of layers of which some row was never found."""
        lost: set[int] = set()
        for width in self._parts:
            _, layers, _ = self._table(width)
            lost.update(layers[~self._found[width]].tolist())
        return [self.names[layer] for layer in sorted(lost)]

    def _table(self, width: int) -> tuple[Array, Array, Array]:
        import numpy as np

        if width not in self._tables:
            hashes, layers, rows = (np.concatenate(columns) for columns in zip(*self._parts[width], strict=True))
            order = np.argsort(hashes, kind="stable")
            self._tables[width] = hashes[order], layers[order], rows[order]
            self._found[width] = np.zeros(len(order), bool)
        return self._tables[width]


def hash_rows(matrix: Array) -> Array:
    """Return a 64-bit hash of the bytes of each row of a floating-point matrix, uint64 (out,).

    The hash is the sum of each number's bits times a random odd 64-bit number of its column (multilinear hashing,
    Lemire and Kaser, "Strongly universal string hashing is fast", 2014).
    """
    import numpy as np

    matrix = np.ascontiguousarray(matrix)
    bits = matrix.view(np.dtype(f"u{matrix.dtype.itemsize}"))
    factors = np.random.default_rng(0).integers(0, 1 << 63, matrix.shape[1], dtype=np.uint64) * np.uint64(2)
    factors += np.uint64(1)
    hashes = np.empty(len(matrix), np.uint64)
    step = max(1, (1 << 22) // matrix.shape[1])
    for start in range(0, len(matrix), step):
        hashes[start : start + step] = (bits[start : start + step].astype(np.uint64) * factors).sum(axis=1)
    # The low bits of a sum of products are weak; sorting looks at all of them.
    return hashes ^ (hashes >> np.uint64(32))
