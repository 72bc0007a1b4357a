"""`quantize-weights`: weights of a graph as codes of 4 or 8 bits, which the engine multiplies by and looks up."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from msgspec import Meta

from ..core.errors import LlmoptError, UsageError
from ..core.params import Ignore, MaxDrop, Params, Symmetric
from ..core.passes import GraphPass, PassResult, Skip
from ..core.patterns import matches
from ..core.quantized import Grid
from ..graphs.nbits import BLOCKS, Activations

if TYPE_CHECKING:
    import numpy as np

    from ..core.facts import ModelFacts
    from ..core.graph import GraphModel
    from ..core.passes import PassContext
    from ..core.target import Target
    from ..graphs.nbits import Blocks
    from ..graphs.weights import Weight

    Array = np.ndarray[Any, Any]

_GROUP, _BYTE = 32, 8


class QuantizeWeightsParams(Params, frozen=True):
    """Which weights, and on which grid."""

    products: Annotated[
        Literal["all", "none"] | tuple[str, ...],
        Meta(description="The products to multiply by codes: all, none, or the names that patterns match."),
    ] = "all"
    bits: Annotated[Literal[4, 8], Meta(description="Bits of a weight in a product.")] = 4
    embeddings: Annotated[
        Literal[4, 8, "none"],
        Meta(description="Bits of embeddings, and of a head that is tied to them; `none` leaves them as they are."),
    ] = 8
    group_size: Annotated[
        Literal[16, 32, 64, 128, 256] | None,
        Meta(
            description="Weights of a row that share a scale. When not given 32, or a row with `operators: standard`."
        ),
    ] = None
    symmetric: Symmetric = True
    clip: Annotated[
        Literal["mse", "none"],
        Meta(description="Shrink the range of each group to where the squared error is smallest, or keep it whole."),
    ] = "mse"
    activations: Annotated[
        Activations,
        Meta(description="What products compute with: float32, or int8 (faster, slightly less exact)."),
    ] = "int8"
    operators: Annotated[
        Literal["fused", "standard"],
        Meta(
            description="`fused` are ONNX Runtime's own, which OpenVINO reads too; with the `standard` ones of ONNX "
            "embeddings are looked up in 8 bits, and no product is computed from codes."
        ),
    ] = "fused"
    max_drop: MaxDrop = 0.05
    ignore: Ignore = ()
    required: Annotated[
        bool,
        Meta(description="Refuse a model in which nothing can be done; otherwise it stays as it is, and that is said."),
    ] = True


class QuantizeWeights(GraphPass[QuantizeWeightsParams]):
    """Store weights as codes and compute with those; inputs and outputs of layers stay in floating point.

    Codes that an earlier pass gave a layer stay what they are.
    """

    name: ClassVar[str] = "quantize-weights"
    not_after: ClassVar[frozenset[str]] = frozenset({"quantize-weights"})
    rounds: ClassVar[bool] = True
    Params: ClassVar[type[Params]] = QuantizeWeightsParams

    def drop(self) -> float:
        """Return how much may be lost."""
        return self.params.max_drop

    def stored_bits(self) -> tuple[float | None, float | None]:
        """Return the bits of the codes, and of a scale for each group."""
        scale = 32 / (self.params.group_size or _GROUP)
        products = None if self.params.products in ("none", ()) else self.params.bits + scale
        return products, None if self.params.embeddings == "none" else self.params.embeddings + scale

    def check(self, facts: ModelFacts, target: Target) -> None:
        """Refuse parameters that standard operators cannot hold, and those that leave nothing to do.

        Raises:
            UsageError: with what to change.
        """
        del facts, target
        params = self.params
        if params.products in ("none", ()) and params.embeddings == "none":
            raise UsageError(
                f"`{self.name}` has nothing to do",
                where="neither products nor embeddings",
                hint="name one of them, such as `embeddings: 8`, or leave the pass out",
            )
        if params.operators == "fused":
            return
        wrong = (
            f"products: {params.products}"
            if params.products not in ("none", ())
            else f"embeddings: {params.embeddings}"
            if params.embeddings != _BYTE
            else f"group_size: {params.group_size}"
            if params.group_size is not None
            else "symmetric: false"
            if not params.symmetric
            else None
        )
        if wrong is not None:
            raise UsageError(
                f"`{self.name}` has no standard operators for `{wrong}`",
                where="with those it looks embeddings up in bytes, with a scale for each row",
                hint="give `products: none, embeddings: 8` alone, or leave `operators` out",
            )

    def run(self, model: GraphModel, context: PassContext) -> PassResult:
        """Round the weights and put their codes into the graph.

        Raises:
            LlmoptError: there is none and one is `required`, or a weight is not finite.
        """
        from ..graphs.weights import find_weights, put_codes, tidy_weights

        result, standard = PassResult(), self.params.operators == "standard"
        found, left = find_weights(model.graph)
        result.skipped = [Skip(name, reason) for name, reason in left]
        counts, worst, before, after = {"products": 0, "embeddings": 0}, 0.0, 0, 0
        with context.reporter.step(self.name, len(found)) as step:
            for weight in found:
                step.advance(detail=weight.name)
                bits = self._bits(weight)
                if isinstance(bits, str):
                    result.skipped.append(Skip(weight.name, bits))
                    continue
                look_up = bool(weight.lookups) and self.params.embeddings != "none"
                matrix = weight.matrix()
                blocks, error = self._round(weight, matrix, bits, shared=bool(weight.products) and look_up)
                put_codes(
                    model.graph,
                    weight,
                    blocks,
                    activations=self.params.activations,
                    look_up=look_up,
                    standard=standard,
                )
                model.rounded.update(blocks.digests())
                result.changed.append(weight.name)
                result.layers[weight.name] = {"bits": bits, "relative_error": float(f"{math.sqrt(error):.4g}")}
                counts["products"] += len(weight.products)
                counts["embeddings"] += look_up
                worst, before, after = max(worst, error), before + matrix.nbytes, after + blocks.nbytes
        tidy_weights(model.graph)
        if not result.changed and self.params.required:
            reasons = "; ".join(sorted({skip.reason for skip in result.skipped}))
            raise LlmoptError(
                "no weight of the graph can be stored as codes",
                where=reasons or "it has neither products nor embeddings in floating point",
                hint="leave the pass out, or set `required: false`",
            )
        result.metrics = {f"{kind}_count": count for kind, count in counts.items()}
        result.metrics |= {"error_max_ratio": worst, "weights_before_bytes": before, "weights_after_bytes": after}
        return result

    def _bits(self, weight: Weight) -> int | str:
        """Return the bits of a weight, or why it is left alone."""
        params, name = self.params, weight.name
        pattern = next((pattern for pattern in params.ignore if matches(name, pattern)), None)
        if pattern is not None:
            return f"ignored by `{pattern}`"
        chosen = params.products == "all" or (
            params.products != "none" and any(matches(name, pattern) for pattern in params.products)
        )
        if weight.lookups and params.embeddings != "none":
            if weight.products and not chosen:
                return "a product reads it in floating point too"
            if params.embeddings * weight.shape[1] % _BYTE:
                return f"{weight.shape[1]} codes of {params.embeddings} bits do not fill whole bytes"
            return params.embeddings
        if not weight.products:
            return "embeddings are left as they are"
        return params.bits if chosen else "its product was not named"

    def _round(self, weight: Weight, matrix: Array, bits: int, *, shared: bool) -> tuple[Blocks, float]:
        """Return the codes of a matrix, and the squared error over its square.

        Raises:
            LlmoptError: the matrix holds NaN or Inf.
        """
        import numpy as np
        import torch

        from ..graphs.nbits import Blocks, to_blocks
        from .numerics.grid import round_to_nearest

        if not np.isfinite(matrix).all():
            raise LlmoptError(f"`{weight.name}` holds NaN or Inf", hint="check the model's weights")
        width = matrix.shape[1]
        block = width if self.params.operators == "standard" else self._block(width, shared=shared)
        # A block that is cut short is filled with zeros, which lie on every grid.
        filled = np.pad(matrix, ((0, 0), (0, -width % block)))
        grid = Grid(bits=bits, group_size=block, symmetric=self.params.symmetric)
        dtype = torch.float16 if weight.dtype == "FLOAT16" else torch.float32
        rounded = round_to_nearest(torch.from_numpy(filled), grid, dtype, clip=self.params.clip == "mse")
        wide = to_blocks(rounded, bits, block)
        blocks = Blocks(wide.codes[:, :width], wide.scale, wide.zero_point, bits, block).with_scales_as(matrix.dtype)
        difference = float(np.square(blocks.dequantize() - matrix, dtype=np.float64).sum())
        return blocks, difference / max(float(np.square(matrix, dtype=np.float64).sum()), 1e-30)

    def _block(self, width: int, *, shared: bool) -> int:
        """Return how many weights share a scale, such that rows that are looked up too end with a block."""
        wanted = self.params.group_size or _GROUP
        if not shared or width % wanted == 0:
            return wanted
        return next((block for block in reversed(BLOCKS) if block <= wanted and width % block == 0), wanted)
