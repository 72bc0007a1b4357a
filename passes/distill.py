"""Distillation: a smaller or rounded model learns from the one it was made of, or from another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta

from ..core.adapter import AdapterShape
from ..core.errors import UsageError
from ..core.facts import ModelFacts
from ..core.model import ModelHandle
from ..core.params import Params
from ..core.passes import ModelPass, Need, Pass, PassContext, PassResult
from ..core.reads import Input
from ..core.target import Target
from ..core.text import Labels, TextRequest
from .suited import LOGITS, WITHOUT_TEACHER, classes, has_logits, unsuited

_LENGTH = 512
_ADAM = 4
"""How many numbers of four bytes a trained weight takes: itself, its gradient, and two moments."""

_LOSSES = ("kl", "reverse_kl", "js", "hidden", "relation", "cosine", "lm", "labels")

Weight = Annotated[float, Meta(ge=0)]


class DistillParams(Params, frozen=True, kw_only=True):
    """Parameters of `distill`."""

    teacher: Annotated[
        str | None,
        Meta(description="A folder or hub id to learn from; the model as it is before all passes when left out."),
    ] = None
    data: Annotated[
        str | None,
        Meta(
            description="Text to learn from: a .txt, .jsonl, .csv or .parquet file, or hf:NAME[/CONFIG][:SPLIT]; the "
            "calibration data when left out."
        ),
    ] = None
    column: Annotated[str | None, Meta(description="The column of `data` that holds the text.")] = None
    length: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        Meta(description="Tokens in a row; 512, or the model's context where that is shorter."),
    ] = None
    packing: Annotated[
        bool | None,
        Meta(
            description="Pack texts into full rows; otherwise one text is one row. Packed are the texts of language "
            "models when left out."
        ),
    ] = None
    kl: Annotated[
        Weight | None,
        Meta(
            description="Weight of KL(teacher || student) of the answers. The only loss of models with logits when no "
            "loss is named."
        ),
    ] = None
    reverse_kl: Annotated[
        Weight | None,
        Meta(description="Weight of KL(student || teacher): what the teacher finds unlikely becomes unlikely."),
    ] = None
    js: Annotated[Weight | None, Meta(description="Weight of the Jensen-Shannon divergence of the answers.")] = None
    hidden: Annotated[
        Weight | None,
        Meta(
            description="Weight of the error of the blocks' outputs, through learnt projections where widths differ. "
            "With `cosine`, the loss of sentence encoders when none is named."
        ),
    ] = None
    relation: Annotated[
        Weight | None,
        Meta(
            description="Weight of the divergence of how queries, keys and values of a text's tokens relate to one "
            "another in the last block (MiniLMv2). For encoders."
        ),
    ] = None
    cosine: Annotated[
        Weight | None, Meta(description="Weight of 1 - cosine of the texts' embeddings. For sentence encoders.")
    ] = None
    lm: Annotated[Weight | None, Meta(description="Weight of the text's own next token: plain language modelling.")] = (
        None
    )
    labels: Annotated[
        Weight | None,
        Meta(
            description="Weight of the labels of `data`: the classes of its texts, or the answers that continue them, "
            "of which the answers alone count."
        ),
    ] = None
    label_column: Annotated[
        str | None,
        Meta(description="The column of `data` that holds the labels: names or numbers of classes, or text."),
    ] = None
    temperature: Annotated[float, Meta(gt=0, description="Softens the answers that `kl` and others compare.")] = 1.0
    relation_heads: Annotated[int, Meta(ge=1, description="Heads of `relation`; divides both models' width.")] = 12
    steps: Annotated[int, Meta(ge=1, description="Updates of the weights.")] = 1000
    batch_size: Annotated[int, Meta(ge=1, description="Rows that a process computes at once.")] = 8
    accumulation: Annotated[int, Meta(ge=1, description="Batches in a step.")] = 1
    learning_rate: Annotated[float, Meta(gt=0, description="The largest; it falls along half a cosine to zero.")] = 1e-4
    warmup: Annotated[float, Meta(ge=0, le=1, description="Share of the steps in which the rate rises.")] = 0.05
    clip: Annotated[float, Meta(gt=0, description="Length to which longer gradients are shortened.")] = 1.0
    weight_decay: Annotated[float, Meta(ge=0, description="AdamW's decay of weights.")] = 0.0
    precision: Annotated[
        Literal["float32", "bfloat16"],
        Meta(description="What is computed in; weights and their updates are always float32."),
    ] = "float32"
    gradient_checkpointing: Annotated[
        bool, Meta(description="Compute blocks again on the way back instead of keeping what they computed.")
    ] = False
    evaluate_every: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Steps between evaluations on held-out rows; a tenth of all steps when left out."),
    ] = None
    held_out: Annotated[
        int, Meta(ge=1, description="Rows that are measured with and not learnt from; at most a tenth of all.")
    ] = 32
    patience: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Evaluations without a better one after which learning ends; goes on when left out."),
    ] = None
    checkpoint: Annotated[
        str | None,
        Meta(
            description="A folder for checkpoints: the same run, started again, goes on from the last one there. They "
            "lie in the cache when left out."
        ),
    ] = None
    checkpoint_every: Annotated[int, Meta(ge=1, description="Steps between checkpoints.")] = 100
    lora_rank: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(
            description="Learn adapters of this rank alone; they are merged at the end, or, over quantized "
            "layers, kept beside the model. All weights learn when left out."
        ),
    ] = None
    lora_alpha: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="Scale of the adapters; twice the rank when left out.")
    ] = None
    lora_targets: Annotated[
        tuple[str, ...], Meta(description="Layers that get adapters, by the end of their name; all when none is named.")
    ] = ()
    learn_scales: Annotated[
        bool, Meta(description="Of a quantized student let the scales learn too, not only the codes.")
    ] = True
    cache: Annotated[
        str | None,
        Meta(description="A folder for the teacher's answers, computed once, in half precision, also for later runs."),
    ] = None
    top_k: Annotated[int, Meta(ge=1, description="How many tokens of each answer `cache` keeps.")] = 64
    align_vocab: Annotated[
        bool,
        Meta(description="Match the tokens of two vocabularies by their strings, and compare those that both have."),
    ] = False

    def losses(self, facts: ModelFacts) -> dict[str, float]:
        """Return the weights of the losses by name; those that suit the model where none is named."""
        given = {name: float(value) for name in _LOSSES if (value := getattr(self, name))}
        if given or any(getattr(self, name) is not None for name in _LOSSES):
            return given
        return {"kl": 1.0} if has_logits(facts) else {"hidden": 1.0, "cosine": 1.0}

    @property
    def losses_need_teacher(self) -> bool:
        """Whether anything but the text itself is learnt from."""
        given = {name for name in _LOSSES if getattr(self, name)}
        return not given or not given <= WITHOUT_TEACHER


class Distill(ModelPass[DistillParams]):
    """Let the model learn from its teacher: win back what earlier passes took (Hinton et al., 2015).

    The student is the model as the passes before this one left it, the teacher the model before them, or one that
    is named. Layers that an earlier pass quantized learn on their grids, straight through rounding: what is trained
    is what is exported. Zeros of `sparsify` stay zeros. With `lora_rank` adapters learn over quantized layers instead
    (Dettmers et al., 2023, QLoRA) and are kept beside the model, in the artifact's folder `adapter`; after
    `extract-adapter` they begin as what that found. The whole runs through accelerate: `accelerate launch --multi_gpu
    -m llmopt …` with the same arguments trains on several processes and machines. Dropout is off. The state with the
    least loss on held-out rows is the result; if none is better than the untrained student, that one stays.
    """

    name = "distill"
    needs = frozenset({Need.GRADIENTS, Need.TEACHER})
    # Learning does not see activations rounded, and would make another model than the one that was calibrated.
    not_after = frozenset({"quantize-activations", "quantize-kv"})
    Params = DistillParams

    def requires(self) -> frozenset[Need]:
        """Return that a teacher is needed, unless the text alone is learnt from."""
        return self.needs if self.params.losses_need_teacher else self.needs - {Need.TEACHER}

    def teacher(self) -> str | None:
        """Return the named teacher."""
        return self.params.teacher

    def inputs(self) -> tuple[Input, ...]:
        """Return the named teacher and the named text."""
        teacher = () if self.params.teacher is None else (Input("teacher", self.params.teacher),)
        return teacher if self.params.data is None else (*teacher, Input("text", self.params.data))

    def trains(self) -> bool:
        """Return that several processes can share the work."""
        return True

    def keeps_adapter(self, earlier: Sequence[Pass[Any]]) -> AdapterShape | None:
        """Return the adapter that learns over quantized layers, with which it cannot be merged."""
        if self.params.lora_rank is None or all(one.grid() is None for one in earlier):
            return None
        return AdapterShape(self.params.lora_rank, self.params.lora_targets)

    def check_earlier(self, earlier: Sequence[Pass[Any]]) -> None:
        """Refuse adapters that would be merged into sparse weights."""
        merged = self.params.lora_rank is not None and self.keeps_adapter(earlier) is None
        if merged and any(one.name == "sparsify" for one in earlier):
            raise UsageError(
                "merged adapters would fill the zeros of `sparsify`",
                where="pass `distill`: lora_rank",
                hint="leave lora_rank out: all weights but the zeros learn; or round before it, and they stay beside",
            )

    def text(self, facts: ModelFacts) -> TextRequest:
        """Return the rows that the steps can use."""
        from ..core.processes import world_size

        params = self.params
        packing = facts.is_causal_lm and not params.labels if params.packing is None else params.packing
        labels = Labels(params.label_column, classes(facts)) if params.labels and params.label_column else None
        rows = params.steps * params.batch_size * params.accumulation * world_size()
        length = params.length or min(_LENGTH, _context(facts.config) or _LENGTH)
        return TextRequest(params.data, params.column, length, packing, rows, params.held_out, labels)

    def whole_bytes(self, facts: ModelFacts) -> int:
        """Return the bytes of weights, gradients and moments, of a teacher as large, and of a batch's logits."""
        trained = 1 if self.params.lora_rank else _ADAM
        text = facts.config.get("text_config") or facts.config
        length = self.text(facts).length
        logits = 6 * self.params.batch_size * length * int(text.get("vocab_size") or 0) if has_logits(facts) else 0
        return 4 * (facts.parameters * (trained + 1) + logits)

    def check(self, facts: ModelFacts, target: Target) -> None:  # noqa: ARG002
        """Refuse models that cannot be taught yet, and losses that do not suit the model."""
        where = f"pass `distill`, architecture {facts.architecture or 'unknown'}"
        losses = self.params.losses(facts)
        if not facts.has_tokenizer or not facts.architecture:
            raise UsageError(
                f"`{facts.source}` cannot be taught with text",
                where=f"{where}: it has no tokenizer" if facts.architecture else where,
                hint="put tokenizer.json and tokenizer_config.json beside the weights",
            )
        if facts.is_encoder_decoder:
            raise UsageError(
                "encoder-decoders cannot be distilled yet",
                where=f"{where}: what its decoder reads is not in plain text",
                hint="use a decoder or an encoder",
            )
        if _experts(facts.config):
            raise UsageError(
                "mixtures of experts cannot be distilled yet",
                where=f"{where}: the router's balance would be lost",
                hint="use a dense model",
            )
        self._check_losses(facts, losses, where)
        self._check_heeded(losses, where)

    def _check_heeded(self, losses: dict[str, float], where: str) -> None:
        """Refuse parameters that do nothing without others."""
        params, usual = self.params, DistillParams()
        compared = bool({"kl", "reverse_kl", "js"} & losses.keys())
        for names, heeded, needs in (
            (("lora_alpha", "lora_targets"), params.lora_rank is not None, "`lora_rank`"),
            (("top_k",), params.cache is not None, "`cache`"),
            (("column",), params.data is not None, "`data`"),
            (("relation_heads",), "relation" in losses, "a weight for `relation`"),
            (("temperature",), compared, "a weight for `kl`, `reverse_kl` or `js`"),
            (("teacher", "align_vocab"), params.losses_need_teacher, "a loss that compares with a teacher"),
            (("label_column",), "labels" in losses, "a weight for `labels`"),
        ):
            idle = next((name for name in names if getattr(params, name) != getattr(usual, name)), None)
            if idle is not None and not heeded:
                raise UsageError(
                    f"`{idle}` does nothing without {needs}", where=where, hint="give that too, or leave it out"
                )

    def _check_losses(self, facts: ModelFacts, losses: dict[str, float], where: str) -> None:
        if not losses:
            raise UsageError(
                "there is nothing to learn from",
                where=f"{where}: every loss has weight 0",
                hint="give a loss a weight, such as `kl: 1`",
            )
        for name in losses:
            why = unsuited(name, facts)
            if why is not None:
                raise UsageError(
                    f"the loss `{name}` does not suit the model",
                    where=f"{where}: {why}",
                    hint="use `kl`" if has_logits(facts) else "use `hidden`, `relation` or `cosine`",
                )
        if "labels" in losses:
            self._check_labels(where)
        if self.params.cache is not None:
            self._check_cache(facts, losses, where)

    def _check_cache(self, facts: ModelFacts, losses: dict[str, float], where: str) -> None:
        """Refuse a cache of what is no answer, and of more tokens than there are."""
        if not set(losses) <= {"kl", "reverse_kl", "js", *WITHOUT_TEACHER}:
            raise UsageError(
                "only answers are cached",
                where=f"{where}: {', '.join(sorted(set(losses) & {'hidden', 'relation', 'cosine'}))} need the teacher",
                hint="leave `cache` out",
            )
        vocabulary = (facts.config.get("text_config") or facts.config).get("vocab_size")
        if isinstance(vocabulary, int) and self.params.top_k > vocabulary:
            raise UsageError(
                f"{self.params.top_k} tokens of each answer are more than there are",
                where=f"{where}: its vocabulary has {vocabulary}",
                hint=f"use --top-k {min(64, vocabulary)}",
            )

    def _check_labels(self, where: str) -> None:
        """Refuse data that has no labels, and rows that are no texts of their own."""
        params = self.params
        data = params.data or ""
        if not params.label_column or not data or data.endswith(".txt"):
            raise UsageError(
                "labels are read from a column of `data`",
                where=f"{where}: data {params.data}, label_column {params.label_column}",
                hint="name a .jsonl, .csv or .parquet file with --data, and its column with --label-column",
            )
        if params.packing:
            raise UsageError(
                "packed rows have no labels",
                where=f"{where}: packing",
                hint="leave `packing` out: with labels a text is a row",
            )

    def check_teacher(self, facts: ModelFacts, teacher: ModelFacts, *, same_vocabulary: bool) -> None:
        """Refuse a teacher of another kind, or with another vocabulary."""
        where = f"pass `distill`: student {facts.architecture}, teacher {teacher.architecture}"
        if teacher.is_encoder_decoder or teacher.is_causal_lm != facts.is_causal_lm:
            raise UsageError(
                f"`{teacher.source}` cannot teach `{facts.source}`",
                where=where,
                hint="decoders learn from decoders, encoders from encoders",
            )
        needed = set(self.params.losses(facts)) & LOGITS
        if needed - {"lm"} and not has_logits(teacher):
            raise UsageError(
                f"`{teacher.source}` has no logits to learn from", where=where, hint="use a teacher with a head"
            )
        if not same_vocabulary and not self.params.align_vocab:
            raise UsageError(
                "student and teacher have different vocabularies",
                where=f"pass `distill`: `{facts.source}` and `{teacher.source}`",
                hint="let tokens be matched by their strings with --align-vocab, or use another teacher",
            )
        if "relation" in self.params.losses(facts):
            self._check_heads(facts)
            self._check_heads(teacher)

    def _check_heads(self, facts: ModelFacts) -> None:
        width = facts.config.get("hidden_size")
        if isinstance(width, int) and width % self.params.relation_heads:
            raise UsageError(
                f"{self.params.relation_heads} relation heads do not divide a width of {width}",
                where=f"pass `distill`: `{facts.source}`",
                hint="choose another number with --relation-heads",
            )

    def run(self, model: ModelHandle, context: PassContext) -> tuple[ModelHandle, PassResult]:
        """Teach the model."""
        from .training.distillation import distill

        return distill(model, self.params, context)


def _experts(config: dict[str, Any]) -> bool:
    text = config.get("text_config") or config
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any(isinstance(text.get(name), int) and text[name] > 1 for name in names)


def _context(config: dict[str, Any]) -> int | None:
    text = config.get("text_config") or config
    found = (text.get(name) for name in ("max_position_embeddings", "n_positions"))
    return next((length for length in found if isinstance(length, int) and length > 0), None)
