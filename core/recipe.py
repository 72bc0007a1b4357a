"""A recipe: which model, which passes in which order, which exports. Plain data, checked, and nothing more."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from .params import Params

Task = Literal[
    "text-classification",
    "token-classification",
    "question-answering",
    "feature-extraction",
    "sentence-similarity",
    "fill-mask",
    "text2text-generation",
    "text-generation",
    "image-classification",
    "automatic-speech-recognition",
]
TASKS: tuple[Task, ...] = get_args(Task)


class ModelSpec(Params, frozen=True, kw_only=True):
    """Where the model comes from."""

    id: Annotated[str, Meta(description="A local folder or a hub id.")]
    revision: Annotated[str | None, Meta(description="Branch, tag or commit on the hub.")] = None
    trust_remote_code: Annotated[bool, Meta(description="Run Python code that comes with the model.")] = False
    task: Annotated[
        Task | None,
        Meta(
            description="What the model is used for, which decides its head; as its files say when left out. "
            "sentence-similarity gives embeddings of whole texts."
        ),
    ] = None


class CalibrationSpec(Params, frozen=True, kw_only=True):
    """Text that the statistics of the passes are taken from."""

    data: Annotated[
        str,
        Meta(description="A .txt, .jsonl, .csv or .parquet file, or hf:NAME[/CONFIG][:SPLIT] through `datasets`."),
    ]
    column: Annotated[str | None, Meta(description="The column that holds the text.")] = None
    samples: Annotated[int, Meta(ge=1, description="How many samples to use.")] = 128
    length: Annotated[int, Meta(ge=2, description="Tokens in a sample.")] = 512
    packing: Annotated[
        bool,
        Meta(description="Pack texts into full windows; otherwise one text is one sample, cut at `length`."),
    ] = True


class EvaluationSpec(Params, frozen=True, kw_only=True):
    """What gates are measured with, and how."""

    data: Annotated[
        str | None,
        Meta(
            description="Test data for metrics of quality: a .txt, .jsonl, .csv or .parquet file, or "
            "hf:NAME[/CONFIG][:SPLIT]."
        ),
    ] = None
    name: Annotated[
        Annotated[str, Meta(pattern=r"^[\w.-]+$")] | None,
        Meta(
            description="What gates call the data: METRIC@NAME. The file's name without its ending when left out, with "
            "a hyphen for what is no letter, digit, point or underline."
        ),
    ] = None
    task: Annotated[
        str | None,
        Meta(
            description="perplexity, multiple-choice, generate, transcribe, classify, similarity, retrieval; what fits "
            "the metrics, the model and the columns when left out."
        ),
    ] = None
    columns: Annotated[
        dict[str, str], Meta(description="Columns by their role in the task, where they have unusual names.")
    ] = msgspec.field(default_factory=dict[str, str])
    samples: Annotated[Annotated[int, Meta(ge=1)] | None, Meta(description="Samples to use; all when left out.")] = None
    length: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        Meta(description="Tokens of a window of running text; 512, or what the context has room for, when left out."),
    ] = None
    max_new_tokens: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Tokens to generate for an answer; the longest answer's, and 8, when left out."),
    ] = None
    confidence: Annotated[float, Meta(gt=0, lt=1, description="Confidence of the intervals.")] = 0.95
    repeats: Annotated[int, Meta(ge=1, description="How often speed, load time and memory are measured.")] = 5

    @property
    def label(self) -> str:
        """What gates call the data; empty without any."""
        if self.name is not None or self.data is None:
            return self.name or ""
        return re.sub(r"[^\w.-]+", "-", PurePath(self.data.removeprefix("hf:")).stem)


class Step(msgspec.Struct, frozen=True):
    """A pass or an export with its raw parameters: in a recipe `- gptq: {bits: 4}`, or just `- gptq`."""

    name: str
    params: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What `llmopt run` executes; every one-shot command builds one."""

    model: ModelSpec
    calibration: CalibrationSpec | None = None
    passes: tuple[Step, ...] = ()
    exports: tuple[Step, ...] = ()
    gates: tuple[str, ...] = ()
    evaluation: tuple[EvaluationSpec, ...] = ()
    seed: int = 0
    threads: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Render as plain data in the order in which people write it; what is at its default is left out."""
        data: dict[str, Any] = {}
        model = msgspec.to_builtins(self.model)
        data["model"] = self.model.id if self.model == ModelSpec(id=self.model.id) else _without_none(model)
        if self.calibration is not None:
            data["calibration"] = _without_none(msgspec.to_builtins(self.calibration))
        data["passes"] = [{step.name: step.params} if step.params else step.name for step in self.passes]
        data["exports"] = [{step.name: step.params} if step.params else step.name for step in self.exports]
        if self.gates:
            data["gates"] = list(self.gates)
        if self.evaluation:
            evaluations = [_without_usual(one) for one in self.evaluation]
            data["evaluation"] = evaluations if len(evaluations) > 1 else evaluations[0]
        if self.seed:
            data["seed"] = self.seed
        if self.threads is not None:
            data["threads"] = self.threads
        return data


def _without_usual(spec: EvaluationSpec) -> dict[str, Any]:
    usual = msgspec.to_builtins(EvaluationSpec())
    return {key: value for key, value in msgspec.to_builtins(spec).items() if value != usual[key]}


def _without_none(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None}
