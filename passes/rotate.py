"""Rotations of the residual stream and of the attention heads' values."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from ..core.errors import UsageError
from ..core.facts import ModelFacts
from ..core.model import ModelHandle
from ..core.params import Params
from ..core.passes import ModelPass, PassContext, PassResult, Skip
from ..core.target import Target

_ONLY_VALUES = "rotate the values of the attention heads only, with `residual: false`, or leave `rotate` out"


class RotateParams(Params, frozen=True, kw_only=True):
    """Parameters of `rotate`."""

    residual: Annotated[
        bool,
        Meta(
            description="Rotate the residual stream: embeddings, head, and every layer that reads the stream or writes "
            "to it. Norms are folded into the layers that follow; tied embeddings are untied."
        ),
    ] = True
    values: Annotated[
        bool,
        Meta(description="Rotate the values of every attention head: the rows that make them and the output layer."),
    ] = True


class Rotate(ModelPass[RotateParams]):
    """Rotate channels by randomized Hadamard matrices, so that no weight or activation stands out (QuaRot, SpinQuant).

    The function stays as it was, and nothing is left to compute when the model runs: the residual stream (R1) and the
    heads' values (R2) are rotated inside the weights (Ashkboos et al., 2024; Liu et al., 2024). Put a pass that rounds
    after it. The rows that make values and the columns that read them are made equally long first: mixed with a large
    channel, small ones would be lost. Every rotated block is proven on random tokens; a model whose norms subtract a
    mean (LayerNorm) or weigh what a layer writes to the stream (Gemma 2) is refused.
    """

    name = "rotate"
    # Scales that were moved before would be folded and mixed again, zeros would fill, and layers measured before are
    # others after it.
    not_after = frozenset({"allocate-bits", "awq", "rotate", "smooth", "sparsify"})
    before_rounding = True
    Params = RotateParams

    def check(self, facts: ModelFacts, target: Target) -> None:  # noqa: ARG002
        """Refuse what the outline shows to be no stream that can be rotated."""
        if not (self.params.residual or self.params.values):
            raise UsageError("nothing to rotate", where="pass `rotate`", hint="set `residual` or `values` to true")
        if not self.params.residual:
            return
        why = None
        if facts.is_encoder_decoder:
            why = "an encoder-decoder has several streams"
        elif facts.biased_norms:
            why = f"`{facts.biased_norms[0]}` is a norm with a bias: a LayerNorm, which subtracts the mean"
        if why is not None:
            raise UsageError(
                f"the residual stream of {facts.architecture or facts.source} cannot be rotated",
                where=f"pass `rotate`: {why}",
                hint=_ONLY_VALUES,
            )

    def facts_after(self, facts: ModelFacts) -> ModelFacts:
        """Return the outline with a head of its own, where config.json says that it was tied."""
        config = facts.config
        width, rows = config.get("hidden_size"), config.get("vocab_size")
        if not (self.params.residual and config.get("tie_word_embeddings") and width and rows):
            return facts
        added = width * rows
        return msgspec.structs.replace(
            facts, parameters=facts.parameters + added, bytes=facts.bytes + added * facts.bytes // facts.parameters
        )

    def run(self, model: ModelHandle, context: PassContext) -> tuple[ModelHandle, PassResult]:
        """Rotate the model."""
        from .numerics.hadamard import Rotation

        rotated, report = model.rotate(
            (lambda width: Rotation(width, context.seed)) if self.params.residual else None,
            (lambda width: Rotation(width, context.seed + 1)) if self.params.values else None,
            seed=context.seed,
            reporter=context.reporter,
        )
        result = PassResult(
            changed=list(report.changed),
            skipped=[Skip(name, reason) for name, reason in report.skipped],
            metrics={
                "folded_norms_count": report.folded,
                "rotated_values_count": report.paired,
                "block_difference_max_ratio": report.block_difference,
            },
        )
        if report.logit_difference is not None:
            result.metrics["logit_difference_max_ratio"] = report.logit_difference
        if report.untied is not None:
            result.notes.append(f"`{report.untied}` is a tensor of its own now: it no longer equals the embeddings")
        return rotated, result
