"""Artifacts on the Hugging Face hub: sent once their files are what the manifest says, fetched and checked again."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..core.errors import LlmoptError, UnmetError, UsageError
from ..core.manifest import MANIFEST, RUN, FileRecord, Manifest, RunRecord
from ..core.progress import Reporter
from ..core.untrusted import is_inner_path, lies_in
from ..evaluation.gates import label
from .artifact import existing_folder, read_manifest, read_run
from .output import file_record, readable, staging

_REPO = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True, slots=True)
class Published:
    """What is on the hub.

    Attributes:
        repository: `org/name`.
        commit: its hash.
        files: how many the artifact has.
        bytes: of all of them.
    """

    repository: str
    commit: str
    files: int
    bytes: int


def push(
    directory: Path, repository: str, *, public: bool, branch: str | None, message: str | None, reporter: Reporter
) -> Published:
    """Send an artifact to the hub, as one commit; what the hub has already of an earlier try is not sent again.

    Args:
        directory: the artifact.
        repository: `org/name`; made if it is not there.
        public: let everyone read a repository that is made here; one that is there stays as it is.
        branch: made if it is not there; the main one when None.
        message: of the commit.
        reporter: shown progress.

    Raises:
        UsageError: it is no artifact of ours, or the name is none.
        UnmetError: its verification or a gate was not met, or a file is not what the manifest says.
        LlmoptError: the hub does not take it.
    """
    _check_name(repository)
    root = existing_folder(str(directory))
    manifest = read_manifest(root)
    if manifest is None:
        hint = "give a folder that llmopt wrote, the one above several exports"
        raise UsageError(f"`{directory}` is no artifact of llmopt", where=f"there is no {MANIFEST} in it", hint=hint)
    _check_met(directory, manifest, read_run(root))
    files = _listed(manifest)
    with reporter.step("checking files", len(files)) as step:
        for name, expected in files.items():
            _check_file(root, name, expected)
            step.advance(detail=name)
    also = [name for name in (MANIFEST, RUN) if (root / name).is_file()]
    _refuse_offline("to send anything")
    from huggingface_hub import CommitOperationAdd, HfApi

    api, names = HfApi(), [*files, *also]
    with _hub_errors(repository), reporter.step(f"sending to {repository}", 1) as step:
        api.create_repo(repository, private=not public, exist_ok=True)
        if branch is not None:
            api.create_branch(repository, branch=branch, exist_ok=True)
        # The manifest comes with the same commit: a reader finds the whole artifact, or what was there before.
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=root / name) for name in names]
        commit = api.create_commit(
            repository,
            operations,
            commit_message=message or f"llmopt {manifest.llmopt}: {manifest.source['id']}",
            revision=branch,
        )
        step.advance()
    return Published(repository, str(commit.oid), len(names), sum((root / name).stat().st_size for name in names))


def pull(repository: str, output: Path, *, revision: str | None, force: bool, reporter: Reporter) -> Published:
    """Fetch an artifact from the hub into a folder, which appears once every file is what the manifest says.

    Args:
        repository: `org/name`.
        output: the folder to write.
        revision: branch, tag or commit; all files are of the one commit that it is now.
        force: replace a former artifact of ours.
        reporter: shown progress.

    Raises:
        UsageError: the name is none, or the output must not be replaced.
        UnmetError: a file is not what the manifest says.
        LlmoptError: the hub does not give it, or it is no artifact of ours.
    """
    _check_name(repository)
    with staging(output, force=force) as stage:
        _refuse_offline("to fetch anything")
        from huggingface_hub import HfApi

        with _hub_errors(repository):
            found = HfApi().model_info(repository, revision=revision)
        commit, names = str(found.sha), {one.rfilename for one in found.siblings or ()}
        if MANIFEST not in names:
            hint = "llmopt takes models of any repository by their name: llmopt quantize org/name"
            raise LlmoptError(f"`{repository}` is no artifact of llmopt", where=f"it has no {MANIFEST}", hint=hint)

        def fetch(name: str) -> None:
            with _hub_errors(repository):
                cast("Any", HfApi()).hf_hub_download(repository, name, revision=commit, local_dir=stage.work)
            place = stage.root / name
            place.parent.mkdir(parents=True, exist_ok=True)
            (stage.work / name).rename(place)

        for name in sorted(names & {MANIFEST, RUN}):
            fetch(name)
        manifest = read_manifest(stage.root)
        assert manifest is not None  # it was just fetched
        files = _listed(manifest)
        with reporter.step(f"fetching {repository}", len(files)) as step:
            for name, expected in files.items():
                fetch(name)
                _check_file(stage.root, name, expected)
                step.advance(detail=name)
        _check_met(Path(repository), manifest, read_run(stage.root))
        readable(stage.root)
        stage.commit()
    every = [*files.values(), file_record(output / MANIFEST)]
    return Published(repository, commit, len(every), sum(file.bytes for file in every))


def _listed(manifest: Manifest) -> dict[str, FileRecord]:
    """Return every file of an artifact but the manifest, by path; the manifest was checked to name none elsewhere."""
    found = dict(manifest.files)
    for record in manifest.exports:
        found |= {(Path(record.directory) / name).as_posix(): file for name, file in record.files.items()}
    return found


def _check_file(root: Path, name: str, expected: FileRecord) -> None:
    path = root / name
    if not is_inner_path(name) or not lies_in(path, root) or not path.is_file():
        raise UnmetError(f"`{path}` is missing, or leads out of the artifact", hint="build the artifact again")
    found = file_record(path)
    if found != expected:
        where = f"SHA-256 {found.sha256}, {MANIFEST} says {expected.sha256}"
        raise UnmetError(f"`{path}` was changed", where=where, hint="build the artifact again")


def _check_met(directory: Path, manifest: Manifest, run: RunRecord | None) -> None:
    """Refuse an artifact that was set aside: it is not the model, or did not meet a gate."""
    exports = ((one.name, parity) for one in manifest.exports for parity in (one.verification, one.adapted))
    failed = [name for name, parity in exports if parity is not None and not parity.passed]
    unmet = [label(gate) for gate in (run.gates if run is not None else ()) if gate.verdict != "passed"]
    if failed or unmet:
        what = "the verification" if failed else "a gate"
        raise UnmetError(
            f"{what} of `{directory}` was not met",
            where=f"exports: {', '.join(failed)}" if failed else f"gates: {', '.join(unmet)}",
            hint="what was set aside is not published: build it again",
        )


def _check_name(repository: str) -> None:
    if not _REPO.fullmatch(repository):
        raise UsageError(f"`{repository}` is no repository of the hub", hint="write it as org/name")


def _refuse_offline(what: str) -> None:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise LlmoptError(f"the hub is needed {what}", where="HF_HUB_OFFLINE is set", hint="unset HF_HUB_OFFLINE")


@contextmanager
def _hub_errors(repository: str) -> Generator[None]:
    """Turn what the hub, or the way to it, refuses into one message; a token is in none of them."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except (HfHubHTTPError, HFValidationError) as error:
        raise LlmoptError(
            f"the hub refuses `{repository}`",
            where=_first_line(error),
            hint="check the name; a private repository, and sending, need a token with that right (`hf auth login`)",
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        hint = "run the same again: what is on the hub already is not sent again"
        raise LlmoptError(f"the way to `{repository}` broke", where=_first_line(error), hint=hint) from None
    except Exception as error:
        if not _is_connection(error):
            raise
        hint = "run the same again: what is on the hub already is not sent again"
        raise LlmoptError(f"the way to `{repository}` broke", where=_first_line(error), hint=hint) from None


def _is_connection(error: Any) -> bool:
    """Return whether an HTTP library raised it: huggingface_hub has changed from one to another."""
    return type(error).__module__.partition(".")[0] in {"httpx", "httpcore", "requests", "urllib3"}


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"hf_\w{8,}", "hf_…", text)[:300]
