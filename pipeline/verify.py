"""Checking a finished artifact again: its files, and its answers in its own runtime."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..core.errors import LlmoptError, UnmetError, UsageError
from ..core.manifest import MANIFEST, ExportRecord, FileRecord, Manifest
from ..core.params import convert
from ..core.progress import Reporter
from ..exporters import EXPORTERS
from ..runtimes import RUNTIMES
from .artifact import existing_folder, read_manifest
from .card import CARD
from .output import file_record


def verify(directory: Path, *, reporter: Reporter) -> list[ExportRecord]:
    """Compare every file with its hash, open every export in its runtime, and compare it with the kept answers.

    Args:
        directory: an artifact of ours, or one export of it.
        reporter: shown progress.

    Returns:
        The exports with the figures of this verification.

    Raises:
        UsageError: it is no artifact of ours.
        UnmetError: a file was changed, or an answer is outside its tolerance.
    """
    folder = existing_folder(str(directory))
    root = next((place for place in (folder, folder.resolve().parent) if (place / MANIFEST).is_file()), None)
    manifest = read_manifest(root) if root is not None else None
    if root is None or manifest is None:
        raise UsageError(
            f"`{directory}` is no artifact of llmopt",
            where=f"there is no {MANIFEST} in it",
            hint="give a folder that llmopt wrote; `llmopt eval` and `llmopt bench` take any model folder",
        )
    chosen = [
        record
        for record in manifest.exports
        if folder.resolve() in {root.resolve(), (root / record.directory).resolve()}
    ]
    _check_files(root, {name: record for name, record in manifest.files.items() if name != CARD})
    if CARD in manifest.files and (not (root / CARD).is_file() or file_record(root / CARD) != manifest.files[CARD]):
        reporter.note(f"{CARD} is no longer the model card that was built; nothing else depends on it")
    for record in chosen:
        _check_files(root / record.directory, record.files)
    verified = [_check_answers(root, record, manifest, reporter) for record in chosen]
    unmet = [record for record in verified if record.verification is not None and not record.verification.passed]
    if unmet:
        from .verdict import judged

        raise UnmetError(
            f"`{directory}` no longer gives the answers of the model that was exported",
            where="\n".join(map(judged, unmet)),
            hint="an engine of another version may compute otherwise: compare `versions` in llmopt.json",
        )
    return verified


def _check_files(folder: Path, records: dict[str, FileRecord]) -> None:
    for name, expected in records.items():
        path = folder / name
        if not path.is_file():
            raise UnmetError(f"`{path}` is missing", hint="build the artifact again")
        found = file_record(path)
        if found != expected:
            raise UnmetError(
                f"`{path}` was changed",
                where=f"SHA-256 {found.sha256}, {MANIFEST} says {expected.sha256}",
                hint="build the artifact again",
            )


def _check_answers(root: Path, record: ExportRecord, manifest: Manifest, reporter: Reporter) -> ExportRecord:
    from .fingerprint import FINGERPRINT, check_fingerprint

    directory = root / record.directory
    made = EXPORTERS.load(record.name)
    exporter = made(convert(record.params, made.Params, where=f"{MANIFEST}, export `{record.name}`"))
    runtime = RUNTIMES.load(exporter.opened_in())()
    kept = root / FINGERPRINT
    with reporter.step(f"verifying {record.name} in {runtime.name}", 1) as step:
        session = runtime.open(directory)
        try:
            if not kept.is_file() or record.verification is None:
                reporter.note(f"{record.name}: opened; no answers are kept for {manifest.source['architecture']}")
                return msgspec.structs.replace(record, verification=None, adapted=None)
            parity = check_fingerprint(
                kept, session, runtime=runtime.version(), tolerance=record.verification.tolerance
            )
        except (LookupError, ValueError) as error:
            raise LlmoptError(f"`{kept}` is damaged", where=f"{error!r}", hint="build the artifact again") from None
        finally:
            session.close()
        step.advance()
    if record.adapted is not None:
        reporter.note(f"{record.name}: the adapter's files are as they were written; the kept answers are the base's")
    return msgspec.structs.replace(record, verification=parity, adapted=None)
