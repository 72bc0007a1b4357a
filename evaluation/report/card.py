"""The report as a model card: Markdown with the hub's metadata in its header; nothing in it depends on the machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ...core.numbers import labelled, number, plain, share, size
from .document import ArtifactEntry, ExportEntry
from .page import PARTS

_LIBRARIES = {"safetensors": "transformers", "onnx": "onnx", "onnx-genai": "onnx", "openvino": "openvino"}
_PIPELINES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
}
_MARKS = re.compile(r"([\\`*\[\]<>|#~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def card(entry: ArtifactEntry) -> str:
    """Return the model card of an artifact, its header first.

    The header names the base model where that is on the hub, and the license where the source's card names one.
    """
    parts = [
        f"# {_inline(_title(entry))}",
        _inline(entry.summary),
        *(f"> **Warning:** {_inline(one)}" for one in entry.warnings),
        _exports(entry),
        _sizes(entry),
        _passes(entry),
        _layers(entry),
        _evaluations(entry),
        _loading(entry),
        _left_out(entry),
        _origin(entry),
    ]
    return "\n\n".join([_header(entry), *(part for part in parts if part)]) + "\n"


def _title(entry: ArtifactEntry) -> str:
    name = PurePosixPath(str(entry.source.get("id", "model"))).name or "model"
    done = " + ".join(dict.fromkeys(one.name for one in entry.passes))
    return f"{name}, {done}" if done else name


def _header(entry: ArtifactEntry) -> str:
    import yaml

    source = entry.source
    names = [export.name for export in entry.exports]
    header: dict[str, Any] = {}
    if source.get("revision"):  # only a repository of the hub has one
        header["base_model"] = str(source["id"])
        header["base_model_relation"] = "quantized" if entry.layers else "finetune"
    library = next((_LIBRARIES[name] for name in _LIBRARIES if name in names), None)
    if library:
        header["library_name"] = library
    if task := _task(entry):
        header["pipeline_tag"] = task
    header |= {key: source[key] for key in ("license", "license_name", "license_link") if source.get(key)}
    bits = sorted({int(value) for one in entry.maps if one.figure == "bits" for value in (one.low, one.high)})
    tags = ["llmopt", *names, *(one.name for one in entry.passes)]
    tags += [f"{bits[0]}-bit"] if len(bits) == 1 else ["mixed-precision"] if bits else []
    header["tags"] = list(dict.fromkeys(tags))
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def _task(entry: ArtifactEntry) -> str | None:
    if entry.task is not None:
        return entry.task
    architecture = str(entry.source.get("architecture", ""))
    return next((task for ending, task in _PIPELINES.items() if architecture.endswith(ending)), None)


def _exports(entry: ArtifactEntry) -> str:
    header = ("Export", "Folder", "Size", "Of the source", "Opened in", "Verified", "Weights", "Largest difference",
              "Mean KL, nats", "Top-1")  # fmt: skip
    rows = [_export(export, export.name, export.verification or {}) for export in entry.exports]
    rows += [_export(one, f"{one.name} + adapter", one.adapted) for one in entry.exports if one.adapted is not None]
    return "## Files\n\n" + _table(header, rows)


def _export(export: ExportEntry, name: str, figures: Mapping[str, Any]) -> list[str]:
    verdict = "not verified" if not figures else "passed" if figures["passed"] else "failed"
    weights = {None: "–", True: "equal bit for bit", False: "differ"}[figures.get("weights_equal")]
    return [
        name,
        f"`{export.directory}`",
        size(export.size_bytes),
        _or_dash(export.share, share),
        figures.get("runtime", "–"),
        verdict,
        weights,
        _or_dash(figures.get("max_difference"), number),
        _or_dash(figures.get("mean_kl"), number),
        _or_dash(figures.get("top1_agreement"), share),
    ]


def _sizes(entry: ArtifactEntry) -> str:
    before = entry.source.get("parts") or {}
    columns = [("Before", before)] if before else []
    columns += [(export.name, export.parts) for export in entry.exports if export.parts]
    kinds = [name for name in PARTS if any(name in parts for _, parts in columns)]
    rows = [[PARTS[kind], *(_or_dash(parts.get(kind), size) for _, parts in columns)] for kind in kinds]
    return "## Size by part\n\n" + _table(("Part", *(name for name, _ in columns)), rows) if rows else ""


def _passes(entry: ArtifactEntry) -> str:
    if not entry.passes:
        return ""
    rows = [
        [
            one.name if one.export is None else f"{one.name} ({one.export})",
            number(one.changed),
            number(one.left_out),
            ", ".join(f"{key} {value}" for key, value in one.params.items()) or "as usual",
            "; ".join([*(" ".join(labelled(key, value)) for key, value in one.metrics.items()), *one.notes]) or "–",
        ]
        for one in entry.passes
    ]
    return "## What was done\n\n" + _table(("Pass", "Changed", "Left out", "Parameters", "Figures and notes"), rows)


def _layers(entry: ArtifactEntry) -> str:
    if not entry.layers:
        return ""
    told = f"{number(int(entry.layers['count']))} layers were rounded"
    if "bits_per_weight" in entry.layers:
        told += f", to {number(entry.layers['bits_per_weight'])} bits per weight with their scales"
    if "median_relative_error" in entry.layers:
        told += f"; the median of their relative errors is {share(entry.layers['median_relative_error'])}"
    highest = [
        f"In `{one.stack}` it is between {share(one.low)} and {share(one.high)}, the highest in `{one.highest}`."
        for one in entry.maps
        if one.figure == "relative_error" and not {"`", "\n"} & set(one.stack + one.highest)
    ]
    return " ".join([f"## Rounded layers\n\n{told}.", *highest])


def _evaluations(entry: ArtifactEntry) -> str:
    found: list[str] = []
    for one in entry.evaluations:
        rows = [
            [
                labelled(name, None)[0],
                plain(name, figure.value),
                "–" if figure.low is None else f"{plain(name, figure.low)} to {plain(name, figure.high)}",
            ]
            for name, figure in one.figures.items()
        ]
        whose = "the source" if one.export is None else one.export
        found.append(f"### {_inline(whose)}, on {_inline(one.data)} in {_inline(one.runtime)}")
        found.append(_table(("Figure", "Value", f"{share(one.confidence)} interval"), rows))
    return "\n\n".join(["## Evaluation", *found]) if found else ""


def _loading(entry: ArtifactEntry) -> str:
    found = [
        f"{_inline(f'{export.name}, in {snippet.engine}')}:\n\n{_code(snippet.code, snippet.language)}"
        for export in entry.exports
        for snippet in export.load
    ]
    return "\n\n".join(["## How to load it", "From the folder of this file:", *found]) if found else ""


def _left_out(entry: ArtifactEntry) -> str:
    lines: list[str] = []
    for one in entry.passes:
        for skip in one.skipped:
            more = f" and {number(skip.more)} more" if skip.more else ""
            lines.append(f"{one.name}: {', '.join(skip.names)}{more}: {skip.reason}")
    lines += [f"{export.name}: {note}" for export in entry.exports for note in export.notes]
    return "## Left out, and notes\n\n" + "\n".join(f"* {_inline(line)}" for line in lines) if lines else ""


def _origin(entry: ArtifactEntry) -> str:
    source = entry.source
    rows = [["Source", str(source.get("id", ""))]]
    labels = {"revision": "Revision", "architecture": "Architecture", "dtype": "Stored as", "sha256": "SHA-256"}
    rows += [[label, str(source[key])] for key, label in labels.items() if source.get(key)]
    if isinstance(source.get("parameters"), int):
        rows.append(["Parameters", number(source["parameters"])])
    if entry.calibration:
        told = ", ".join(" ".join(labelled(key, value)) for key, value in entry.calibration.items())
        rows.append(["Calibration", told])
    rows += [["llmopt", entry.llmopt], *([name, version] for name, version in entry.versions.items())]
    recipe = f"The recipe:\n\n{_code(entry.recipe.rstrip(), 'yaml')}"
    return f"## Origin\n\n{_table(('What', 'Which'), rows)}\n\n{recipe}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return text if re.fullmatch(r"`[\w./-]+`", text) else _inline(text)


def _inline(text: str) -> str:
    """Return text in which nothing is a mark of Markdown or HTML, on one line."""
    return _MARKS.sub(r"\\\1", " ".join(text.split())).replace("&", "&amp;")


def _code(code: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _or_dash(value: Any, write: Any) -> str:
    return "–" if value is None else write(value)
