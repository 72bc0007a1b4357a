"""`quantize-static`: products in 8 bits with fixed ranges, found on calibration text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from msgspec import Meta

from ..core.errors import LlmoptError
from ..core.params import Ignore, Params
from ..core.passes import GraphPass, Need, PassResult, Skip

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    import onnx_ir as ir

    from ..core.graph import Engine, GraphModel
    from ..core.passes import PassContext
    from ..graphs.int8 import Int8Product, Range
    from ..graphs.scores import Int8Scores

    Array = np.ndarray[Any, Any]
    Chosen = Int8Product | Int8Scores

_ROWS = 64
"""Inputs of a product, from each batch, that its error is measured on."""


class QuantizeStaticParams(Params, frozen=True):
    """How ranges are found, and how much may be lost."""

    observer: Annotated[
        Literal["minmax", "percentile", "entropy", "mse"],
        Meta(description="How the range of an input is chosen from the values seen."),
    ] = "minmax"
    percentile: Annotated[float, Meta(gt=50, le=100, description="Share of the values that `percentile` covers.")] = (
        99.99
    )
    max_drop: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="How much of the outputs may be lost on the calibration text, as mean 1 - cosine: the most "
            "sensitive products stay in float32 until it is less.",
        ),
    ] = 0.01
    ignore: Ignore = ()


class QuantizeStatic(GraphPass[QuantizeStaticParams]):
    """Multiply in 8 bits: inputs on one fixed unsigned range each, weights with a scale for each output.

    Since ranges are fixed, a text's result does not depend on the texts beside it. OpenVINO multiplies queries and keys
    of attention in 8 bits too (`attention.N`); ONNX Runtime cannot.
    """

    name: ClassVar[str] = "quantize-static"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CALIBRATION})
    not_after: ClassVar[frozenset[str]] = frozenset({"quantize-static", "fix-shapes"})  # calibration batches vary
    rounds: ClassVar[bool] = True
    Params: ClassVar[type[Params]] = QuantizeStaticParams

    def drop(self) -> float:
        """Return how much may be lost; text that was not calibrated on may lose a little more."""
        return 2 * self.params.max_drop

    def stored_bits(self) -> tuple[float | None, float | None]:
        """Return the bits of a product's weights; what is looked up stays as it is."""
        return 8, None

    def run(self, model: GraphModel, context: PassContext) -> PassResult:
        """Find the ranges, round, and put products back to float32 until the loss is allowed.

        Raises:
            LlmoptError: the graph has no product that could be rounded, or an input holds NaN or Inf.
        """
        from ..graphs.int8 import Int8Product
        from ..graphs.scores import Int8Scores

        del context
        found, left = _candidates(model.graph, model.engine, self.params.ignore)
        exact, ranges, rows = self._observe(model, found)
        errors = {one.name: one.error(rows, ranges) for one in found}
        order = sorted(found, key=lambda one: errors[one.name], reverse=True)
        kept, drop = self._fewest_in_float(model, order, exact, ranges)
        chosen = order[kept:]
        _quantize(model.graph, chosen, ranges, model.engine)
        result = PassResult(changed=sorted(one.name for one in chosen))
        result.skipped = [Skip(name, reason) for name, reason in left]
        result.skipped += [Skip(one.name, f"its error in 8 bits is {errors[one.name]:.2g}") for one in order[:kept]]
        result.metrics = {
            "products_count": sum(isinstance(one, Int8Product) for one in chosen),
            "scores_count": sum(isinstance(one, Int8Scores) for one in chosen),
            "drop_max_ratio": drop,
            "error_max_ratio": max((errors[one.name] for one in chosen), default=0.0),
        }
        return result

    def _observe(
        self, model: GraphModel, chosen: Sequence[Chosen]
    ) -> tuple[list[list[Array]], dict[ir.Value, Range], dict[ir.Value, Array]]:
        """Return the outputs in float32, the range of every input, and a few rows of each."""
        import numpy as np
        import torch

        from ..core.activations import ActivationGrid
        from ..graphs.int8 import Range
        from .numerics.observers import Histogram, Span, fit_input

        values = list(dict.fromkeys(value for one in chosen for value in one.inputs))
        spans = {value: Span() for value in values}
        rows: dict[ir.Value, list[Array]] = {value: [] for value in values}
        exact: list[list[Array]] = []
        for made, seen in _run(model, values):
            exact.append(made)
            for value, array in zip(values, seen, strict=True):
                flat = array.reshape(-1, array.shape[-1])
                if not np.isfinite(flat).all():
                    raise LlmoptError(f"an input of `{value.name}` holds NaN or Inf", hint="the model overflows")
                spans[value].add(torch.from_numpy(flat))
                rows[value].append(flat[:: max(1, len(flat) // _ROWS)][:_ROWS].copy())
        ranges = {value: Range(min(span.low, 0.0), max(span.high, 0.0)) for value, span in spans.items()}
        if self.params.observer != "minmax":
            grid = ActivationGrid(number="int8", scale="tensor", symmetric=False)
            histograms = {value: Histogram(span) for value, span in spans.items()}
            for _, seen in _run(model, values):
                for value, array in zip(values, seen, strict=True):
                    histograms[value].add(torch.from_numpy(array))
            for value, histogram in histograms.items():
                rounding = fit_input(grid, histogram, self.params.observer, self.params.percentile, torch.float32)
                low = (-128 - (rounding.zero_point or 0)) * (rounding.scale or 1.0)
                ranges[value] = Range(min(low, 0.0), max(low + 255 * (rounding.scale or 1.0), 0.0))
        return exact, ranges, {value: np.concatenate(parts) for value, parts in rows.items()}

    def _fewest_in_float(
        self, model: GraphModel, order: Sequence[Chosen], exact: list[list[Array]], ranges: dict[ir.Value, Range]
    ) -> tuple[int, float]:
        """Return how many of the most sensitive products must stay in float32, and what is lost then.

        Raises:
            LlmoptError: not even one can be rounded.
        """
        lowest, highest, best = 0, len(order) - 1, (len(order), 0.0)
        drop = self._drop(model, order, exact, ranges)
        if drop <= self.params.max_drop:
            return 0, drop
        everything = drop
        while lowest < highest:
            middle = (lowest + highest + 1) // 2
            drop = self._drop(model, order[middle:], exact, ranges)
            if drop <= self.params.max_drop:
                best, highest = (middle, drop), middle - 1
            else:
                lowest = middle
        if best[0] == len(order):
            raise LlmoptError(
                f"`{self.name}` loses more than {self.params.max_drop:g} even with a single product in 8 bits",
                where=f"all of them: {everything:.3g}",
                hint="allow more with max_drop, or leave the pass out",
            )
        return best

    @staticmethod
    def _drop(
        model: GraphModel, chosen: Sequence[Chosen], exact: list[list[Array]], ranges: dict[ir.Value, Range]
    ) -> float:
        """Return the mean of 1 - cosine of the outputs when `chosen` are rounded."""
        from ..graphs.running import outputs

        trial = _trial(model, chosen, ranges)

        distances = [
            _distance(expected, got)
            for made, reference in zip(outputs(trial, model.feeds), exact, strict=True)
            for expected, got in zip(reference, made, strict=True)
        ]
        return sum(distances) / max(1, len(distances))


def _candidates(graph: ir.Model, engine: Engine, ignore: Sequence[str]) -> tuple[list[Chosen], list[tuple[str, str]]]:
    """Return what the engine may multiply in 8 bits, and (name, reason) of what is left alone.

    Raises:
        LlmoptError: there is no product.
    """
    from ..core.patterns import matches
    from ..graphs.int8 import selected
    from ..graphs.scores import scores

    chosen, left = selected(graph, ignore)
    found: list[Chosen] = [*chosen]
    for one in scores(graph) if engine == "openvino" else ():
        if any(matches(one.name, pattern) for pattern in ignore):
            left.append((one.name, "ignored"))
        else:
            found.append(one)
    return found, left


def _quantize(graph: ir.Model, chosen: Sequence[Chosen], ranges: Mapping[ir.Value, Range], engine: Engine) -> None:
    from ..graphs.int8 import Int8Product, quantize_products
    from ..graphs.scores import Int8Scores, quantize_scores

    quantize_scores(graph, [one for one in chosen if isinstance(one, Int8Scores)], ranges)
    quantize_products(graph, [one for one in chosen if isinstance(one, Int8Product)], ranges, engine)


def _trial(model: GraphModel, chosen: Sequence[Chosen], ranges: Mapping[ir.Value, Range]) -> ir.Model:
    """Return a copy of the graph with `chosen` in 8 bits; weights that stay are shared with the graph."""
    copy = model.graph.clone()
    names = {one.name for one in chosen}
    spans = {value.name: span for value, span in ranges.items()}
    found = [one for one in _candidates(copy, model.engine, ())[0] if one.name in names]
    _quantize(copy, found, {value: spans[value.name] for one in found for value in one.inputs}, model.engine)
    return copy


def _run(model: GraphModel, values: Sequence[ir.Value]) -> Iterator[tuple[list[Array], list[Array]]]:
    from ..graphs.running import outputs

    count = len(model.graph.graph.outputs)
    for made in outputs(model.graph, model.feeds, values):
        yield made[:count], made[count:]


def _distance(expected: Array, got: Array) -> float:
    import numpy as np

    first, second = expected.astype(np.float64), got.astype(np.float64)
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    cosines = (first * second).sum(-1) / np.where(norms == 0, 1, norms)
    return float(1 - np.where(norms == 0, 1, cosines).mean())
