"""Building an artifact again from its manifest, to show that it is what the manifest says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import msgspec

from ..calibration.source import open_source
from ..core.ends import scratch
from ..core.errors import LlmoptError, UnmetError, UsageError
from ..core.manifest import MANIFEST, FileRecord, Manifest
from ..core.plan import Limits, Plan
from ..core.progress import Reporter
from ..models.checkpoint import Checkpoint, read_header
from ..models.locate import locate
from ..models.onnx_file import GraphSource
from .artifact import existing_folder, read_manifest
from .plan import make_plan
from .recipe import parse_recipe

_NAMED = 3
"""So many tensors of a file are named."""

_ELSEWHERE = "paths are those of the recipe: run it in the folder where the artifact was built"


def rebuild(directory: Path, *, reporter: Reporter) -> int:
    """Run the manifest's recipe again in a temporary folder and compare the bytes.

    Args:
        directory: an artifact of ours, all exports of it.
        reporter: shown progress.

    Returns:
        How many files were compared.

    Raises:
        UsageError: it is no artifact of ours.
        LlmoptError: what the artifact was made from is not there, or is no longer the same.
        UnmetError: files differ.
    """
    from .run import run_plan

    root = existing_folder(str(directory))
    manifest = read_manifest(root)
    if manifest is None:
        raise UsageError(
            f"`{directory}` is no artifact of llmopt",
            where=f"there is no {MANIFEST} in it",
            hint="give the folder that holds llmopt.json: several exports are built again together",
        )
    plan = _plan(manifest, root)
    _check_inputs(plan, manifest)
    with scratch("llmopt-rebuild-") as folder:
        again = folder / "artifact"
        try:
            run_plan(plan, again, force=False, reporter=reporter, gates=False)
        except UnmetError as error:  # what it set aside goes with the folder
            hint = f"so it was when `{directory}` was built again"
            raise UnmetError(error.what, where=error.where, hint=hint) from None
        made = read_manifest(again)
        assert made is not None
        differences = [*_files(root, again, manifest, made), *_records(manifest, made)]
    if differences:
        raise UnmetError(
            f"`{directory}` is not what its recipe gives now",
            where="\n".join(differences),
            hint=_cause(manifest, made),
        )
    return len(_listed(manifest)) + 1


def _plan(manifest: Manifest, root: Path) -> Plan:
    """Return the plan that the artifact was made by, its hub revision and memory limits included."""
    recipe = parse_recipe(manifest.recipe, where=str(root / MANIFEST))
    if recipe.model.trust_remote_code:
        raise UsageError(
            "the recipe runs Python code that comes with the model",
            where=str(root / MANIFEST),
            hint="an artifact alone is no reason to run it: look at the recipe in it, and give it to `llmopt run`",
        )
    if revision := manifest.source.get("revision"):
        recipe = msgspec.structs.replace(recipe, model=msgspec.structs.replace(recipe.model, revision=revision))
    try:
        # Gates judge an artifact, and change no byte of it.
        plan = make_plan(msgspec.structs.replace(recipe, gates=(), evaluation=()))
    except UsageError as error:
        where = error.where or str(root / MANIFEST)
        raise LlmoptError(f"cannot build it again: {error.what}", where=where, hint=_ELSEWHERE) from None
    return msgspec.structs.replace(plan, recipe=recipe, limits=msgspec.convert(manifest.limits, Limits))


def _check_inputs(plan: Plan, manifest: Manifest) -> None:
    """Refuse inputs that are no longer what they were, before anything is run."""
    recipe_id, location = plan.recipe.model.id, locate(plan.recipe.model)
    source = Checkpoint(location.folder) if location.graph is None else GraphSource(location, plan.facts)
    _check_same("the source", recipe_id, source.sha256(), manifest.source.get("sha256"))
    if manifest.calibration is not None and plan.recipe.calibration is not None:
        spec = plan.recipe.calibration
        now = open_source(spec.data, spec.column).sha256()
        before = manifest.calibration.get("sha256")
        if now is not None:  # of a data set only what is drawn is hashed: that is compared once it has been
            _check_same("the calibration data", spec.data, now, before)


def _check_same(what: str, name: str, now: str, before: str | None) -> None:
    if now != before:
        raise LlmoptError(
            f"{what} is no longer what it was",
            where=f"`{name}`: SHA-256 {now}, {MANIFEST} says {before}",
            hint="bring back what it was, or build a new artifact",
        )


def _listed(manifest: Manifest) -> dict[str, FileRecord]:
    """Return every file of an artifact but the manifest, by path."""
    inside = {
        (Path(record.directory) / name).as_posix(): file
        for record in manifest.exports
        for name, file in record.files.items()
    }
    return inside | manifest.files


def _files(root: Path, again: Path, manifest: Manifest, made: Manifest) -> Iterator[str]:
    before, after = _listed(manifest), _listed(made)
    for name in sorted(before | after):
        if name not in after:
            yield f"{name}: not made again"
        elif name not in before:
            yield f"{name}: was not there before"
        elif before[name] != after[name]:
            yield f"{name}: differs{_tensors(root / name, again / name)}"


def _tensors(before: Path, after: Path) -> str:
    """Return which tensors of a file differ, in words; nothing where it holds none, or the old one is not there."""
    if not before.is_file() or before.suffix not in {".safetensors", ".onnx"}:
        return ""
    read = _of_safetensors if before.suffix == ".safetensors" else _of_graph
    old, new = dict(read(before)), dict(read(after))
    names = sorted(name for name in old | new if old.get(name) != new.get(name))
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f" in {', '.join(names[:_NAMED])}{more} (of {len(new)} tensors)" if names else " in its header"


def _of_safetensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield name, type and hash of every tensor."""
    with path.open("rb") as stream:
        for name, info in read_header(path).items():
            stream.seek(info.offset)
            yield name, (info.dtype, info.shape, _hash(stream.read(info.nbytes)))


def _of_graph(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield name, type and hash of every tensor, also of those in a file beside the graph."""
    import onnx_ir as ir

    for graph in cast("Any", ir).load(path).graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            yield name, (str(tensor.dtype), tuple(tensor.shape.numpy()), _hash(tensor.tobytes()))


def _hash(data: bytes) -> bytes:
    from hashlib import sha256

    return sha256(data).digest()


def _records(manifest: Manifest, made: Manifest) -> Iterator[str]:
    """Yield what else the manifests say differently; versions and the files' hashes are told apart."""
    before, after = (_comparable(one) for one in (manifest, made))
    for key in before:
        if before[key] != after[key]:
            yield f"{MANIFEST}: `{key}` differs"


def _comparable(manifest: Manifest) -> Mapping[str, Any]:
    record = msgspec.to_builtins(manifest)
    for key in ("llmopt", "versions", "recipe", "files", "limits"):
        del record[key]
    for export in record["exports"]:
        del export["files"]
    return json.loads(json.dumps(record))  # tuples become lists, and a count is the same with a point or without


def _cause(manifest: Manifest, made: Manifest) -> str:
    """Say which versions differ: the likely cause."""
    before = {"llmopt": manifest.llmopt, **manifest.versions}
    after = {"llmopt": made.llmopt, **made.versions}
    changed = [
        f"{name} {before.get(name, 'none')} -> {after.get(name, 'none')}"
        for name in sorted(before | after)
        if before.get(name) != after.get(name)
    ]
    if changed:
        return f"install the versions that it was made with: {', '.join(changed)}"
    return "versions are the same: was it made on another kind of processor, trained on a GPU or by several processes?"
