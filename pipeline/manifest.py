"""What is recorded of an artifact, and written beside it."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from ..core.manifest import ExportRecord, FileRecord, Manifest, PassRecord
from ..core.passes import PassResult
from ..core.plan import Plan
from .card import CARD, license_of, write_card
from .fingerprint import FINGERPRINT, write_fingerprint
from .output import file_record
from .parity import Reference
from .parts import source_parts
from .source import Source
from .steps import AnyPass
from .versions import own_version, versions


def pass_record(one: AnyPass, result: PassResult) -> PassRecord:
    """Return what is recorded of a pass."""
    return PassRecord(
        name=one.name,
        params=msgspec.to_builtins(one.params),
        changed=result.changed,
        skipped=[(skip.name, skip.reason) for skip in result.skipped],
        metrics=result.metrics,
        notes=result.notes,
        allocation=result.allocation,
        curve=result.curve,
        layers=result.layers,
        weight_bytes=result.weight_bytes,
    )


def manifest_of(
    plan: Plan,
    source: Source,
    passes: list[PassRecord],
    exports: list[ExportRecord],
    files: dict[str, FileRecord],
) -> Manifest:
    """Return the record of an artifact.

    Args:
        plan: what was asked for.
        source: what it was made from.
        passes: what was done to the weights.
        exports: what was written, and how it was verified.
        files: those that belong to no single export.
    """
    samples = source.samples
    return Manifest(
        llmopt=own_version(),
        recipe=plan.recipe.to_dict(),
        seed=plan.recipe.seed,
        source={
            "id": source.location.source,
            "revision": source.location.revision,
            "sha256": source.sha256(),
            "architecture": plan.facts.architecture,
            "dtype": plan.facts.dtype,
            "parameters": plan.facts.parameters,
            "bytes": plan.facts.bytes,
            "parts": source_parts(source.checkpoint),
            **license_of(source.location.folder),
        },
        calibration=None
        if samples is None
        else {
            "source": samples.source,
            "samples": len(samples.rows),
            "tokens": samples.tokens,
            "documents": samples.documents,
            "sha256": samples.sha256,
        },
        versions=versions(),
        passes=passes,
        exports=exports,
        files=files,
        limits={"batch_tokens": plan.limits.batch_tokens, "statistics_bytes": plan.limits.statistics_bytes},
    )


def keep_answers(reference: Reference, root: Path) -> dict[str, FileRecord]:
    """Write the answers that a later `llmopt verify` compares with."""
    if not write_fingerprint(reference, root / FINGERPRINT):
        return {}
    return {FINGERPRINT: file_record(root / FINGERPRINT)}


def with_card(manifest: Manifest, root: Path) -> Manifest:
    """Write the model card, and return the manifest with that file among the others."""
    path = write_card(manifest, root)
    return msgspec.structs.replace(manifest, files={CARD: file_record(path), **manifest.files})


def write_record(record: msgspec.Struct, path: Path) -> None:
    """Write a record as JSON."""
    text = json.dumps(msgspec.to_builtins(record), indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
