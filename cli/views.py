"""Results as sections: what a command shows, in which order and words. Pure; `render` draws it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from ..core.adapter import FOLDER
from ..core.numbers import count, in_unit, labelled, number, plain, share, size
from ..passes import PASSES
from .parameters import parameters, value_text
from .render import Lines, Pairs, Section, Table

if TYPE_CHECKING:
    from pathlib import Path

    from ..core.manifest import ExportRecord, GateRecord, Manifest, Parity, PassRecord
    from ..core.plan import Plan
    from ..evaluation.report.document import Report

_HEADINGS = {"source": "Against its source", "ratio_of_first_to_second": "Ratio, first to second"}
_LOAD = {
    "safetensors": 'transformers.AutoModel.from_pretrained("{path}")',
    "onnx": 'onnxruntime.InferenceSession("{path}/model.onnx")',
    "openvino": 'openvino.compile_model("{path}/openvino_model.xml")',
    "onnx-genai": 'onnxruntime_genai.Model("{path}")',
}
_PACKED = {"gptq", "gptq_v2", "awq"}
_LOAD_PACKED = 'vllm.LLM("{path}")'
_USUAL_RANK, _WIDE_RANKS = 16, (32, 64, 128, 256, 320, 512)
"""The rank of adapters that vLLM loads unasked, and those that it can be asked for."""
_COMPRESSED = {"auto", "compressed-tensors"}
_LOAD_DEQUANTIZED = (
    'model = transformers.AutoModel.from_pretrained("{path}", '
    "quantization_config=transformers.CompressedTensorsConfig(dequantize=True))"
)
"""peft adapts layers that have a weight, which packed ones have not."""


def plan_sections(plan: Plan) -> list[Section]:
    """Show what a recipe will do."""
    facts = plan.facts
    model = [
        ("source", facts.source),
        ("architecture", facts.architecture or facts.model_type),
        ("parameters", f"{count(facts.parameters)}, {facts.dtype}, {size(facts.bytes)}"),
        ("blocks", f"{facts.blocks}, with {len(facts.linears)} linear layers"),
    ]
    if plan.recipe.calibration is not None:
        spec = plan.recipe.calibration
        model.append(("calibration", f"{spec.data}, {spec.samples} samples of {spec.length} tokens"))
    steps = [(str(index), step.kind, step.title, step.detail) for index, step in enumerate(plan.steps, 1)]
    sections: list[Section] = [
        Pairs("Model", model),
        Table("Steps", ("", "kind", "what", "detail"), steps, frozenset({0})),
    ]
    if plan.skips:
        sections.append(Lines("Left out", _skips(plan.skips)))
    estimates = [
        ("peak memory", f"{size(plan.peak_bytes)}, the interpreter and its libraries included"),
        ("output", f"{size(plan.output_bytes)}{_of(plan.output_bytes, facts.bytes)}"),
    ]
    return [*sections, Pairs("Estimates", estimates)]


def manifest_sections(
    manifest: Manifest, directory: Path, *, source_bytes: int, gates: Sequence[GateRecord] = ()
) -> list[Section]:
    """Show what was made, how far it is the model, what was measured for its gates, and where it lies."""
    sections: list[Section] = []
    several = len(manifest.exports) > 1
    passes = list(manifest.passes)
    for export in manifest.exports:
        renamed = (replace(record, name=f"{export.name}: {record.name}") for record in export.passes)
        passes += renamed if several else export.passes
    if passes:
        sections.append(_passes(passes, manifest.recipe))
    # Notes were said while the work went on.
    left = [f"{record.name}: {line}" for record in passes for line in _skips(record.skipped)]
    if left:
        sections.append(Lines("Left out", left))
    sections += export_sections(manifest.exports, directory, source_bytes=source_bytes)
    sections += gate_sections(gates)
    calls = [_load(record, directory, manifest) for record in manifest.exports]
    calls += [call for record in manifest.exports for call in _load_adapter(record, directory, manifest)]
    return [*sections, Lines("To load it", [call for call in calls if call], code=True)]


def gate_sections(gates: Sequence[GateRecord]) -> list[Section]:
    """Show every gate: what was measured, the interval it lies in, and the verdict."""
    if not gates:
        return []
    beside = [name for name in ("export", "evaluation") if len({getattr(gate, name) or "" for gate in gates}) > 1]
    rows: list[tuple[str, ...]] = []
    for gate in gates:
        needed = f", {gate.samples_needed} samples would decide" if gate.samples_needed else ""
        verdict = {"passed": "passed", "failed": "FAILED", "undecided": f"UNDECIDED{needed}"}[gate.verdict]
        interval = _interval(gate.low, gate.high, gate.unit) if gate.samples else "exact"
        row = (gate.text, in_unit(gate.value, gate.unit), interval, str(gate.samples or "-"), verdict)
        rows.append((*(getattr(gate, name) or "-" for name in beside), *row))
    header = (*beside, "gate", "measured", "interval", "samples", "verdict")
    return [Table("Gates", header, rows, frozenset({3 + len(beside)}))]


def evaluation_sections(report: Mapping[str, Any]) -> list[Section]:
    """Show what `llmopt eval` found: every metric with its interval, and the source's beside it."""
    shown = ("path", "runtime", "data", "task", "samples", "windows", "tokens")
    sections: list[Section] = [Pairs("", [labelled(name, report[name]) for name in shown if name in report])]
    metrics = report["metrics"]
    compared = any(row["source"] is not None for row in metrics)
    rows = []
    for row in metrics:
        unit = row["unit"]
        cells = (row["metric"], in_unit(row["value"], unit), _interval(row["low"], row["high"], unit))
        source = "-" if row["source"] is None else in_unit(row["source"], unit)
        rows.append((*cells, source) if compared else cells)
    header = ("metric", "measured", f"interval ({share(report['confidence'])})")
    sections.append(Table("Metrics", (*header, "source") if compared else header, rows, frozenset({1})))
    return sections


def _interval(low: float | None, high: float | None, unit: str) -> str:
    if low is None or high is None:
        return "no interval"
    return f"{in_unit(low, unit)} to {in_unit(high, unit)}"


def export_sections(
    records: Sequence[ExportRecord], directory: Path, *, source_bytes: int | None = None
) -> list[Section]:
    """Show the artifacts and how each was verified."""
    rows: list[tuple[str, ...]] = []
    for record in records:
        folder = str(directory / record.directory)
        written = sum(file.bytes for file in record.files.values())
        of_source = _of(written, source_bytes) if source_bytes else ""
        rows.append((record.name, folder, str(len(record.files)), f"{size(written)}{of_source}"))
    sections: list[Section] = [Table("Artifacts", ("export", "folder", "files", "size"), rows, frozenset({2}))]
    checked = [row for record in records for row in _verifications(record)]
    header = ("export", "opened with", "weights", "max diff", "1 - cosine", "mean KL", "top-1", "positions")
    sections.append(Table("Verified", header, checked, frozenset({3, 4, 5, 6, 7})))
    return sections


def written_sections(report: Report, output: Path) -> list[Section]:
    """Show of what a report was written, and where it lies."""
    rows = [
        (
            entry.name,
            export.name,
            size(export.size_bytes),
            "-" if export.share is None else share(export.share),
            "-" if export.verification is None else "passed" if export.verification["passed"] else "FAILED",
        )
        for entry in report.artifacts
        for export in entry.exports
    ]
    sections: list[Section] = [
        Pairs("", [("written", str(output))]),
        Table("Artifacts", ("artifact", "export", "size", "of source", "verified"), rows, frozenset({2, 3})),
    ]
    warnings = [f"{entry.name}: {line}" for entry in report.artifacts for line in entry.warnings]
    return [*sections, Lines("Warnings", warnings)] if warnings else sections


def comparison_sections(report: Mapping[str, Any]) -> list[Section]:
    """Show in what two artifacts differ; of weights that differ the first few are named."""
    weights = [
        {name: _first_names(value) if isinstance(value, list) else value for name, value in one.items()}
        for one in report["weights"]
    ]
    told = weights or {"note": "the artifacts have no export of one kind"}
    first, second = report["artifacts"]
    shown = {key: value for key, value in report.items() if key != "artifacts"}
    return report_sections({"first": first, "second": second, **shown, "weights": told})


def _first_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more or "-"


def _passes(records: Sequence[PassRecord], recipe: Mapping[str, Any]) -> Table:
    """Show what passes did; figures of single layers are in the manifest alone."""
    given: dict[str, Mapping[str, Any]] = {}
    for step in recipe.get("passes", ()):
        if isinstance(step, Mapping):
            given |= step
    rows = []
    for record in records:
        kind = record.name.rpartition(": ")[2]
        metrics = [" ".join(labelled(name, value)) for name, value in record.metrics.items()]
        params = _chosen(kind, record.params, given.get(kind) or {})
        shown = (", ".join(params) or "as usual", ", ".join(metrics) or "-")
        rows.append((record.name, str(len(record.changed)), str(len(record.skipped)), *shown))
    return Table("Passes", ("pass", "changed", "skipped", "parameters", "metrics"), rows, frozenset({1, 2}))


def _chosen(kind: str, params: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return the parameters of a pass that the recipe gives, or that are not what they are when left out."""
    usual = {item.name: item.default for item in parameters(PASSES.load(kind).Params)}
    return [
        f"{name} {text}"
        for name, value in params.items()
        if (name in given or value != usual.get(name)) and (text := value_text(value))
    ]


def _verifications(record: ExportRecord) -> list[tuple[str, ...]]:
    rows = [_verification(record.name, record.verification)]
    return rows if record.adapted is None else [*rows, _verification(f"{record.name} + adapter", record.adapted)]


def _verification(name: str, parity: Parity | None) -> tuple[str, ...]:
    if parity is None:
        return (name, "not verified", "-", "-", "-", "-", "-", "-")
    weights = {None: "-", True: "equal", False: "DIFFER"}[parity.weights_equal]
    return (
        name,
        parity.runtime,
        weights,
        number(parity.max_difference),
        "-" if parity.mean_cosine_distance is None else number(parity.mean_cosine_distance),
        "-" if parity.mean_kl is None else number(parity.mean_kl),
        "-" if parity.top1_agreement is None else share(parity.top1_agreement),
        str(parity.positions),
    )


def _load(record: ExportRecord, directory: Path, manifest: Manifest) -> str:
    call = _LOAD_PACKED if record.params.get("format") in _PACKED else _LOAD.get(record.name, "")
    if record.adapted is not None and record.params.get("format") in _COMPRESSED:
        call = _LOAD_DEQUANTIZED
    architecture = str(manifest.source.get("architecture", ""))
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        call = call.replace("AutoModel", "AutoModelForCausalLM")
    return call.format(path=(directory / record.directory).as_posix())


def _load_adapter(record: ExportRecord, directory: Path, manifest: Manifest) -> list[str]:
    if record.adapted is None:
        return []
    base = (directory / record.directory).as_posix()
    rank = max(one.metrics.get("adapter_rank_max_count", 0) for one in manifest.passes)
    wide = next((f" --max-lora-rank {size}" for size in _WIDE_RANKS if rank <= size), "") if rank > _USUAL_RANK else ""
    served = f"vllm serve {base} --enable-lora{wide} --lora-modules recovered={base}/{FOLDER}"
    if record.params.get("format") in _PACKED:
        return [served]
    return [f'peft.PeftModel.from_pretrained(model, "{base}/{FOLDER}")', served]


def _skips(skips: Iterable[tuple[str, str]]) -> list[str]:
    """Count by reason, and name the first few."""
    names: dict[str, list[str]] = {}
    for name, reason in skips:
        names.setdefault(reason, []).append(name)
    tally = Counter({reason: len(group) for reason, group in names.items()})
    lines = []
    for reason, amount in tally.most_common():
        shown = ", ".join(names[reason][:3]) + (f" and {amount - 3} more" if amount > 3 else "")
        lines.append(f"{shown}: {reason}")
    return lines


def _of(part: int, whole: int) -> str:
    return f" ({share(round(part / whole, 3))} of the source)" if whole else ""


def report_sections(report: Mapping[str, Any], title: str = "") -> list[Section]:
    """Show a report of any shape: single values first, then each nested one under its name.

    The end of a name tells its unit (`load_seconds`, `size_bytes`); a list of mappings becomes a table.
    """
    single = [labelled(name, value) for name, value in report.items() if not _is_nested(value)]
    sections: list[Section] = [Pairs(title, single)] if single else []
    for name, value in report.items():
        heading = _HEADINGS.get(name, name.replace("_", " ").capitalize())
        if not _is_nested(value):
            continue
        if isinstance(value, Mapping):
            sections += _mapping(value, heading)
        else:
            sections.append(_records(value, heading))
    return sections


def _mapping(value: Mapping[str, Any], heading: str) -> list[Section]:
    if all(isinstance(item, Mapping) for item in value.values()):
        return [_records([{"": name, **item} for name, item in value.items()], heading)]
    return report_sections(value, heading)


def _is_nested(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value)
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _records(records: Sequence[Mapping[str, Any]], heading: str) -> Table:
    names = list(dict.fromkeys(name for record in records for name in record))
    rows = [[plain(name, record.get(name)) for name in names] for record in records]
    right = {
        index
        for index, name in enumerate(names)
        if all(isinstance(record.get(name), (int, float)) or record.get(name) is None for record in records)
        and not any(isinstance(record.get(name), bool) for record in records)
    }
    return Table(heading, tuple(labelled(name, None)[0] for name in names), rows, frozenset(right))
