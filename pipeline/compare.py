"""`llmopt compare`: in what two artifacts differ: sizes, passes, verification, layers, and the weights themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.digests import file_sha256
from ..core.errors import UsageError
from ..core.manifest import ExportRecord, Manifest
from ..core.progress import Reporter
from .entry import artifact_entry
from .layer_maps import rounded_layers
from .report import existing_artifact

_MOST_LAYERS = 20
"""Of the layers that differ so many are shown, those that differ most first; all are in the document's counts."""


@dataclass(frozen=True, slots=True)
class _Side:
    path: str
    root: Path
    manifest: Manifest


def compare_artifacts(first: str, second: str, *, reporter: Reporter) -> dict[str, Any]:
    """Return in what two artifacts differ.

    Weights are read back and compared where both have an export of the same name and format: for safetensors layer by
    layer as their readers unpack them, for graphs by the bytes of each constant.

    Args:
        first: a folder that llmopt wrote.
        second: another.
        reporter: shown progress.

    Raises:
        UsageError: one is no artifact.
        LlmoptError: one is damaged.
    """
    sides = _side(first), _side(second)
    if sides[0].root.resolve() == sides[1].root.resolve():
        raise UsageError("an artifact was to be compared with itself", hint="give two folders")
    return {
        "artifacts": [one.path for one in sides],
        "sources": {
            "equal": sides[0].manifest.source.get("sha256") == sides[1].manifest.source.get("sha256"),
            "first": sides[0].manifest.source.get("id"),
            "second": sides[1].manifest.source.get("id"),
        },
        "sizes": _sizes(*sides),
        "passes": _passes(*sides),
        "verification": _verification(*sides),
        "layers": _layers(*sides),
        "weights": [_weights(name, *sides, reporter) for name in _common(*sides)],
    }


def _side(path: str) -> _Side:
    root, manifest = existing_artifact(path)
    return _Side(path, root, manifest)


def _common(first: _Side, second: _Side) -> list[str]:
    theirs = {export.name for export in second.manifest.exports}
    return [export.name for export in first.manifest.exports if export.name in theirs]


def _sizes(first: _Side, second: _Side) -> list[dict[str, Any]]:
    """Return a row for each part of each export, largest difference first within an export."""
    rows: list[dict[str, Any]] = []
    entries = [artifact_entry(one.manifest, one.root, name=one.path, path=one.path) for one in (first, second)]
    exports = [{export.name: export for export in entry.exports} for entry in entries]
    for name in dict.fromkeys([*exports[0], *exports[1]]):
        one, other = exports[0].get(name), exports[1].get(name)
        rows.append(_row(name, "all files", one and one.size_bytes, other and other.size_bytes))
        ours, theirs = one.parts if one else {}, other.parts if other else {}
        rows += [_row(name, part, ours.get(part), theirs.get(part)) for part in dict.fromkeys([*ours, *theirs])]
    return rows


def _row(export: str, part: str, first: int | None, second: int | None) -> dict[str, Any]:
    ratio = float(f"{second / first:.4g}") if first and second else None
    return {
        "export": export,
        "part": part,
        "first_bytes": first,
        "second_bytes": second,
        "second_to_first_share": ratio,
    }


def _passes(first: _Side, second: _Side) -> list[dict[str, Any]]:
    """Return the passes one beside the other, and in which parameters those of a name differ."""
    from ..core.params import value_in_words

    rows: list[dict[str, Any]] = []
    ours, theirs = (list(one.manifest.passes) for one in (first, second))
    names = dict.fromkeys(record.name for record in [*ours, *theirs])
    for name in names:
        left, right = (next((one for one in side if one.name == name), None) for side in (ours, theirs))
        differences: list[str] = []
        if left is not None and right is not None:
            for key in dict.fromkeys([*left.params, *right.params]):
                before, after = left.params.get(key), right.params.get(key)
                if before != after:
                    differences.append(f"{key} {value_in_words(before)} / {value_in_words(after)}")
        rows.append(
            {
                "pass": name,
                "first": left is not None,
                "second": right is not None,
                "different_parameters": differences,
            }
        )
    return rows


def _verification(first: _Side, second: _Side) -> list[dict[str, Any]]:
    return [
        {
            "artifact": side.path,
            "export": export.name,
            "passed": check.passed,
            "max_difference": check.max_difference,
            "mean_kl_nats": check.mean_kl,
            "top1_agreement": check.top1_agreement,
            "opened_in": check.runtime,
        }
        for side in (first, second)
        for export in side.manifest.exports
        if (check := export.verification) is not None
    ]


def _layers(first: _Side, second: _Side) -> dict[str, Any]:
    """Return how bits and errors of the rounded layers differ."""
    ours, theirs = (_rounded(one.manifest) for one in (first, second))
    both = [name for name in ours if name in theirs]
    differing = [name for name in both if ours[name] != theirs[name]]

    def moved(name: str) -> float:
        return abs(theirs[name].get("relative_error", 0.0) - ours[name].get("relative_error", 0.0))

    shown = sorted(differing, key=moved, reverse=True)[:_MOST_LAYERS]
    return {
        "rounded_in_both": len(both),
        "rounded_in_first_only": len(ours.keys() - theirs.keys()),
        "rounded_in_second_only": len(theirs.keys() - ours.keys()),
        "with_other_figures": len(differing),
        "most_different": [
            {
                "layer": name,
                "first_bits": ours[name].get("bits"),
                "second_bits": theirs[name].get("bits"),
                "first_error_share": ours[name].get("relative_error"),
                "second_error_share": theirs[name].get("relative_error"),
            }
            for name in shown
        ],
    }


def _rounded(manifest: Manifest) -> Mapping[str, Mapping[str, float]]:
    return rounded_layers([*manifest.passes, *(one for export in manifest.exports for one in export.passes)])


def _weights(name: str, first: _Side, second: _Side, reporter: Reporter) -> dict[str, Any]:
    """Compare the weights of two exports of one name."""
    records = [next(one for one in side.manifest.exports if one.name == name) for side in (first, second)]
    found: dict[str, Any] = {"export": name, "equal": True, "compared": 0, "different": []}
    found |= {"in_first_alone": [], "in_second_alone": [], "note": ""}
    if _same_files(*records):
        return found | {"note": "the files' hashes are equal"}
    folders = [side.root / record.directory for side, record in zip((first, second), records, strict=True)]
    ours, theirs = (dict(_digests(name, folder, reporter)) for folder in folders)
    both = [one for one in ours if one in theirs]
    found |= {
        "compared": len(both),
        "different": [one for one in both if ours[one] != theirs[one]],
        "in_first_alone": [one for one in ours if one not in theirs],
        "in_second_alone": [one for one in theirs if one not in ours],
    }
    return found | {"equal": not (found["different"] or found["in_first_alone"] or found["in_second_alone"])}


def _same_files(first: ExportRecord, second: ExportRecord) -> bool:
    endings = (".safetensors", ".onnx", ".data", ".bin", ".xml")
    weights = [{key: value for key, value in one.files.items() if key.endswith(endings)} for one in (first, second)]
    return bool(weights[0]) and weights[0] == weights[1]


def _digests(name: str, folder: Path, reporter: Reporter) -> Iterator[tuple[str, str]]:
    """Yield the name and a hash of every weight, as what opens it reads it."""
    if name == "safetensors":
        yield from _unpacked_digests(folder, reporter)
    elif name == "openvino":
        for file in sorted(folder.glob("*.bin")):
            yield file.name, file_sha256(file)
    else:
        yield from _graph_digests(folder, reporter)


def _unpacked_digests(folder: Path, reporter: Reporter) -> Iterator[tuple[str, str]]:
    import torch

    from ..models.unpacked import UnpackedFolder

    opened = UnpackedFolder(folder)
    names = opened.names()
    with reporter.step(f"reading {folder}", len(names)) as step:
        for name in names:
            tensor = opened.read(name)
            digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            yield name, digest.hexdigest()
            step.advance(detail=name)


def _graph_digests(folder: Path, reporter: Reporter) -> Iterator[tuple[str, str]]:
    from ..models.onnx_file import open_graph

    for path in sorted(folder.glob("*.onnx")):
        graphs = list(open_graph(path).graphs())
        with reporter.step(f"reading {path}", sum(len(graph.initializers) for graph in graphs)) as step:
            for graph in graphs:
                for name, value in graph.initializers.items():
                    if value.const_value is not None:
                        digest = hashlib.sha256(f"{value.const_value.dtype} {list(value.const_value.shape)}".encode())
                        digest.update(value.const_value.tobytes())
                        yield name, digest.hexdigest()
                    step.advance(detail=name)
