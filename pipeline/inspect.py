"""`llmopt inspect`: what a model folder or an artifact holds, without opening a tensor."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ..core.errors import UsageError
from ..core.manifest import Manifest
from ..core.params import in_words
from ..core.recipe import ModelSpec
from ..models.checkpoint import Checkpoint
from ..models.locate import Location, locate, looks_like_hub_id, read_config
from ..models.outline import outline
from .artifact import existing_folder, read_manifest


def inspect(path: str) -> dict[str, Any]:
    """Describe a model folder, a hub id or an artifact.

    Raises:
        UsageError: there is nothing to describe.
    """
    folder = Path(path).expanduser()
    if looks_like_hub_id(path) and "/" in path and not folder.exists():
        folder = locate(ModelSpec(id=path)).folder
    else:
        folder = existing_folder(path)
    manifest = read_manifest(folder)
    if manifest is not None:
        return _artifact(path, manifest)
    if any(folder.glob("*.safetensors")) and (folder / "config.json").is_file():
        return _model(path, folder)
    if (folder / "config.json").is_file() and any(folder.glob("*.onnx")):
        return {"path": path, "kind": "onnx", "files": _files(folder), **_config(folder)}
    raise UsageError(
        f"nothing to inspect in `{path}`",
        where="no llmopt.json, and no config.json beside safetensors or an ONNX graph",
        hint="give a model folder or an artifact of llmopt",
    )


def _model(path: str, folder: Path) -> dict[str, Any]:
    checkpoint = Checkpoint(folder)
    facts = outline(Location(folder, path), checkpoint)
    widths = Counter(linear.in_features for linear in facts.linears)
    dtypes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        dtypes[info.dtype] += info.nbytes
    quantization: dict[str, Any] = facts.config.get("quantization_config") or {}
    return {
        "path": path,
        "kind": "model",
        "architecture": facts.architecture,
        "model_type": facts.model_type,
        "parameters": facts.parameters,
        "size_bytes": facts.bytes,
        "blocks": facts.blocks,
        "linear_layers": len(facts.linears),
        "input_features": ", ".join(f"{width} ({count} layers)" for width, count in sorted(widths.items())),
        "group_sizes_that_divide": ", ".join(
            str(size) for size in (256, 128, 64, 32, 16) if widths and all(width % size == 0 for width in widths)
        ),
        "tokenizer": facts.has_tokenizer,
        "quantized": quantization.get("quant_method", False),
        "bytes_by_dtype": {f"{dtype}_bytes": size for dtype, size in dtypes.most_common()},
        "files": _files(folder),
    }


def _artifact(path: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "path": path,
        "kind": "artifact",
        "llmopt": manifest.llmopt,
        "source": str(manifest.source["id"]),
        "architecture": str(manifest.source["architecture"]),
        "source_size_bytes": manifest.source["bytes"],
        "seed": manifest.seed,
        "passes": [
            {
                "pass": record.name,
                "parameters": in_words(record.params),
                "changed": len(record.changed),
                "skipped": len(record.skipped),
                "notes": len(record.notes),
            }
            for record in manifest.passes
        ],
        "exports": [
            {
                "export": record.name,
                "folder": record.directory,
                "size_bytes": sum(file.bytes for file in record.files.values()),
                "files": len(record.files),
                "verified_in": record.verification.runtime if record.verification else "not verified",
                "mean_kl_nats": record.verification.mean_kl if record.verification else None,
                "max_difference": record.verification.max_difference if record.verification else None,
            }
            for record in manifest.exports
        ],
        "versions": manifest.versions,
    }


def _config(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    return {"architecture": (config.get("architectures") or [""])[0], "model_type": config.get("model_type", "")}


def _files(folder: Path) -> list[dict[str, Any]]:
    return [
        {"file": file.relative_to(folder).as_posix(), "size_bytes": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
