"""Finding rows of weight matrices by their content, so that no exporter needs to know how a graph names things."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the rows of a matrix come from.

    Attributes:
        layers: number of the layer, int64 (out,); -1 where the row is unknown.
        rows: number of the row in that layer, int64 (out,).
        hashes: hash of the row, uint64 (out,).
        width: numbers in a row.
    """

    layers: Array
    rows: Array
    hashes: Array
    width: int

    def by_layer(self) -> Iterator[tuple[int, Array]]:
        """Yield each layer with the mask of the rows that come from it."""
        import numpy as np

        for layer in np.unique(self.layers):
            yield int(layer), self.layers == layer

    def part(self, start: int, stop: int) -> Origin:
        """Return the origin of some consecutive rows."""
        return Origin(self.layers[start:stop], self.rows[start:stop], self.hashes[start:stop], self.width)


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

    def find(self, matrix: Array) -> Origin:
        """Return where each row of `matrix`, (out, in), comes from."""
        import numpy as np

        width, wanted = matrix.shape[1], hash_rows(matrix)
        if width not in self._parts:
            unknown = np.full(len(matrix), -1)
            return Origin(unknown, unknown, wanted, width)
        hashes, layers, rows = self._table(width)
        first = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
        known = hashes[first] == wanted
        return Origin(np.where(known, layers[first], -1), np.where(known, rows[first], -1), wanted, width)

    def mark(self, origin: Origin) -> None:
        """Count the rows of `origin` as found, in every layer that holds them."""
        import numpy as np

        hashes, _, _ = self._table(origin.width)
        self._found[origin.width] |= np.isin(hashes, origin.hashes)

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
