"""An artifact of ours, or any folder that a runtime opens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..core.adapter import CONFIG, FOLDER
from ..core.errors import LlmoptError, UsageError
from ..core.manifest import MANIFEST, RUN, ExportRecord, Manifest, RunRecord
from ..core.recipe import ModelSpec
from ..core.runtime import Runtime, Session
from ..core.untrusted import UnreadableError, is_inner_path, read_json
from ..graphs.extents import check_extents
from ..graphs.limits import check_graph_file
from ..models.locate import locate, looks_like_hub_id, near_folder
from ..runtimes import RUNTIMES


@dataclass(frozen=True, slots=True)
class Artifact:
    """A folder that a runtime opens.

    Attributes:
        directory: the folder.
        root: where its manifest lies; None for a folder that is not of our making.
        manifest: the manifest.
        record: the export that `directory` holds.
    """

    directory: Path
    root: Path | None
    manifest: Manifest | None
    record: ExportRecord | None

    def runtime(self) -> Runtime:
        """Return the engine that opens the folder.

        Raises:
            UsageError: none does.
        """
        for name in RUNTIMES:
            runtime = RUNTIMES.load(name)()
            if runtime.opens(self.directory):
                return runtime
        raise UsageError(
            f"`{self.directory}` is nothing that a runtime opens",
            where="no genai_config.json, model.onnx, or config.json with safetensors in it",
            hint="give a model folder or an artifact of llmopt",
        )


def opened_whole(runtime: Runtime, directory: Path, *, threads: int | None = None, parallel: int = 1) -> Session:
    """Open an artifact in its runtime, with the adapter that lies beside it; see `Runtime.open`.

    Raises:
        LlmoptError: one of them does not load.
    """
    session = runtime.open(directory, threads=threads, parallel=parallel)
    adapter = directory / FOLDER
    if (adapter / CONFIG).is_file():
        session.adapt(adapter)
    return session


def existing_folder(path: str) -> Path:
    """Return `path` as a folder.

    Raises:
        UsageError: there is none.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        hint = f"did you mean the folder it lies in, {folder.parent}?"
        raise UsageError(f"`{path}` is a file, not a folder", hint=hint)
    raise UsageError(f"no folder at `{path}`", hint=near_folder(folder) or "give a model folder or an artifact")


def open_artifact(path: str) -> Artifact:
    """Find the artifact at `path`: the folder of one export, or the folder above several; or a model's, or a hub id.

    Raises:
        UsageError: there is none, or it holds several exports and one must be chosen.
        LlmoptError: its graph is damaged, or would take far more time or memory than a model does.
    """
    if looks_like_hub_id(path) and "/" in path and not Path(path).expanduser().exists():
        return Artifact(locate(ModelSpec(id=path)).folder, None, None, None)
    folder = existing_folder(path)
    for graph in sorted(folder.glob("*.onnx")):
        check_graph_file(graph)
        check_extents(graph)
    for root in (folder, folder.resolve().parent):
        manifest = read_manifest(root)
        if manifest is None:
            continue
        inside = {(root / record.directory).resolve(): record for record in manifest.exports}
        if folder.resolve() in inside:
            return Artifact(folder, root, manifest, inside[folder.resolve()])
        if root == folder:
            names = ", ".join(str(folder / record.directory) for record in manifest.exports)
            raise UsageError(f"`{path}` holds several exports", hint=f"give one of them: {names}")
    return Artifact(folder, None, None, None)


def read_manifest(root: Path) -> Manifest | None:
    """Return the manifest in `root`, None if there is none.

    Raises:
        LlmoptError: it is damaged.
    """
    path = root / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = msgspec.convert(read_json(path), Manifest)
        _check_manifest(manifest)
    except (UnreadableError, msgspec.ValidationError, RecursionError) as error:
        hint = "build the artifact again; without llmopt.json the folder still opens in its runtime"
        raise LlmoptError(f"{MANIFEST} is damaged", where=f"{path}\n{error}", hint=hint) from None
    return manifest


def read_run(root: Path) -> RunRecord | None:
    """Return how the run went that made the artifact in `root`, None if that is not kept.

    Raises:
        LlmoptError: the record is damaged.
    """
    path = root / RUN
    if not path.is_file():
        return None
    try:
        return msgspec.convert(read_json(path), RunRecord)
    except (UnreadableError, msgspec.ValidationError, RecursionError) as error:
        hint = "remove it: the artifact is whole without it"
        raise LlmoptError(f"{RUN} is damaged", where=f"{path}\n{error}", hint=hint) from None


def _check_manifest(manifest: Manifest) -> None:
    """Refuse what a manifest of ours never says: a file outside of the artifact, a source without a name.

    Raises:
        UnreadableError: it says what.
    """
    records = [manifest.files, *(record.files for record in manifest.exports)]
    names = [name for files in records for name in files] + [record.directory for record in manifest.exports]
    for name in names:
        if not is_inner_path(name):
            raise UnreadableError(f"{name[:200]!r} is no file of the artifact")
    if any(file.bytes < 0 for files in records for file in files.values()):
        raise UnreadableError("a file has a negative size")
    for key, kind in (("id", str), ("architecture", str), ("bytes", int)):
        if not isinstance(manifest.source.get(key), kind):
            raise UnreadableError(f"`source` has no `{key}` that is {kind.__name__}")
    if not str(manifest.source["id"]).isprintable() or not manifest.exports:
        raise UnreadableError("it names no export, or its source cannot be shown")
