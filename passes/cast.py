"""Store weights in another floating-point dtype."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ..core.facts import ModelFacts
from ..core.model import ModelHandle
from ..core.params import Params
from ..core.passes import ModelPass, PassContext, PassResult

_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}


class CastParams(Params, frozen=True, kw_only=True):
    """Parameters of `cast`."""

    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], Meta(description="The dtype of all floating-point weights.")
    ]


class Cast(ModelPass[CastParams]):
    """Store all floating-point weights as float32, float16 or bfloat16.

    Weights are converted as they are written; one that the dtype cannot hold is an error that names it.
    """

    name = "cast"
    not_after = frozenset({"rtn", "gptq"})
    before_rounding = True
    Params = CastParams

    def facts_after(self, facts: ModelFacts) -> ModelFacts:
        """Return the outline with another dtype."""
        if facts.dtype == self.params.dtype:
            return facts
        width = _WIDTHS[self.params.dtype]
        return msgspec.structs.replace(facts, dtype=self.params.dtype, bytes=facts.parameters * width)

    def run(self, model: ModelHandle, context: PassContext) -> tuple[ModelHandle, PassResult]:  # noqa: ARG002
        """Mark the model; tensors are cast when they are read."""
        before = model.facts.dtype
        return model.cast(self.params.dtype), PassResult(
            changed=["*"] if before != self.params.dtype else [],
            notes=[] if before != self.params.dtype else [f"the weights are {before} already"],
        )
