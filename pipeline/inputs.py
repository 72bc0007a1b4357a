"""The files that a recipe reads: listed for make, and compared with what an artifact was made from."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import msgspec

from ..calibration.source import open_source
from ..core.errors import LlmoptError, UsageError
from ..core.manifest import MANIFEST, RUN, InputRecord, Manifest
from ..core.plan import Plan
from ..core.recipe import CalibrationSpec, ModelSpec, Recipe
from ..models.checkpoint import INDEX, Checkpoint
from ..models.locate import Location, locate
from ..models.onnx_file import GraphSource, external_tensors, open_graph
from ..models.sentence import MODULES
from ..models.side_files import PATTERNS
from .artifact import read_manifest, read_run
from .output import file_record

_MODELS, _TEXTS, _FOLDERS = ("teacher",), ("data",), ("adapters",)
"""Parameters of passes that name a model, text, and folders of adapters."""


def input_files(recipe: Recipe) -> list[Path]:
    """Return every file that a recipe reads, in order: of the model, calibration and test data, teachers and adapters.

    A data set behind `hf:NAME` is no file, and not among them.

    Raises:
        LlmoptError: one of them is not there.
    """
    found = [*_model_files(locate(recipe.model))]
    texts = [recipe.calibration.data] if recipe.calibration is not None else []
    if recipe.evaluation is not None and recipe.evaluation.data is not None:
        texts.append(recipe.evaluation.data)
    for step in recipe.passes:
        for name in _named(step.params, _MODELS):
            trusted = recipe.model.trust_remote_code
            found += _model_files(locate(ModelSpec(id=name, trust_remote_code=trusted)))
        texts += _named(step.params, _TEXTS)
        for name in _named(step.params, _FOLDERS):
            found += _files(Path(name).expanduser(), ("adapter_config.json", "*.safetensors"))
    for text in texts:
        found += _text_files(text)
    return sorted(dict.fromkeys(found))


def _named(params: dict[str, Any], keys: Iterable[str]) -> list[str]:
    values = [params[key] for key in keys if params.get(key)]
    return [str(one) for value in values for one in cast("list[Any]", value if isinstance(value, list) else [value])]


def _model_files(location: Location) -> Iterator[Path]:
    """Yield the files of a model that are read or copied."""
    folder = location.folder
    if location.graph is not None:
        yield location.graph
        tensors = cast("Iterator[Any]", external_tensors(open_graph(location.graph)))
        yield from {folder / str(tensor.location) for tensor in tensors}
    else:
        yield from {info.shard for info in Checkpoint(folder).tensors.values()}
        yield from _files(folder, (INDEX,))
    patterns = (*PATTERNS, "*.py") if location.trust_remote_code else PATTERNS
    yield from _files(folder, patterns, leave_out={MANIFEST, RUN})
    if location.sentence is not None:
        root = location.sentence.root
        yield from _files(root, (MODULES, "*.json"), leave_out={MANIFEST, RUN})
        for module in location.sentence.modules[1:]:
            yield from _files(root / str(module["path"]), ("config.json", "model.safetensors"))


def _text_files(spec: str) -> Iterator[Path]:
    path = Path(spec.removeprefix("hf:")).expanduser()
    if path.is_dir():
        yield from (file for file in sorted(path.rglob("*")) if file.is_file())
    elif path.is_file():
        yield path


def _files(folder: Path, patterns: Iterable[str], *, leave_out: Iterable[str] = ()) -> Iterator[Path]:
    for pattern in patterns:
        yield from (path for path in folder.glob(pattern) if path.is_file() and path.name not in set(leave_out))


def input_records(recipe: Recipe) -> list[InputRecord]:
    """Return what identifies each file that a recipe reads.

    Of weights, config.json and the calibration file the manifest has a hash; here size and time will do.
    """
    hashed = _hashed_elsewhere(recipe)
    return [_record(path, with_hash=path not in hashed) for path in input_files(recipe)]


def _hashed_elsewhere(recipe: Recipe) -> set[Path]:
    location = locate(recipe.model)
    if location.graph is not None:
        own = {path for path in _model_files(location) if path.suffix not in {".json", ".txt", ".model"}}
    else:
        own = {info.shard for info in Checkpoint(location.folder).tensors.values()} | {location.folder / "config.json"}
    spec = recipe.calibration
    return own | ({Path(spec.data)} if spec is not None and not spec.data.startswith("hf:") else set[Path]())


def _record(path: Path, *, with_hash: bool) -> InputRecord:
    state = path.stat()
    digest = file_record(path).sha256 if with_hash else ""
    return InputRecord(path=str(path), bytes=state.st_size, mtime_ns=state.st_mtime_ns, sha256=digest)


def check_unchanged(records: Iterable[InputRecord]) -> None:
    """Refuse files that were changed while they were read.

    Raises:
        LlmoptError: it names the first of them.
    """
    changed = next((record.path for record in records if not _same_state(record)), None)
    if changed is not None:
        raise LlmoptError(
            f"`{changed}` was changed while it was read",
            where="what was made of it may be of both its contents",
            hint="run it again once nothing else writes to it",
        )


def _same_state(record: InputRecord) -> bool:
    try:
        state = Path(record.path).stat()
    except OSError:
        return False
    return (state.st_size, state.st_mtime_ns) == (record.bytes, record.mtime_ns)


def why_outdated(plan: Plan, output: Path, versions: dict[str, str]) -> str | None:
    """Return why an artifact is not what a plan would make now, None if it is.

    Sizes and times of files are looked at first; what differs in them is hashed.

    Args:
        plan: the checked plan.
        output: the artifact's folder.
        versions: of llmopt, Python and the libraries, by name.
    """
    try:
        manifest, run = read_manifest(output), read_run(output)
    except LlmoptError as error:
        return error.what
    if manifest is None or run is None:
        return "there is no artifact" if manifest is None else f"there is no {RUN} in it"
    if manifest.recipe != msgspec.to_builtins(plan.recipe.to_dict()):
        return "the recipe is another"
    if {"llmopt": manifest.llmopt, **manifest.versions} != versions:
        return "versions are others"
    limits = msgspec.to_builtins(plan.limits)
    if any(limits.get(name) != limit for name, limit in manifest.limits.items()):
        return "the limits of memory are others"
    return _other_input(plan.recipe, manifest, run.inputs) or _other_output(manifest, output)


def _other_input(recipe: Recipe, manifest: Manifest, records: list[InputRecord]) -> str | None:
    if [str(path) for path in input_files(recipe)] != [record.path for record in records]:
        return "other files are read"
    suspects = [record for record in records if not _same_state(record)]
    for record in suspects:
        if Path(record.path).stat().st_size != record.bytes:
            return f"{record.path} was changed"
        if record.sha256 and file_record(Path(record.path)).sha256 != record.sha256:
            return f"{record.path} was changed"
    doubtful = {Path(record.path) for record in suspects if not record.sha256}
    spec = recipe.calibration
    if spec is not None and Path(spec.data) in doubtful:
        doubtful.discard(Path(spec.data))
        if not _same_text(spec, manifest):
            return f"{spec.data} was changed"
    if doubtful and _source_hash(recipe) != manifest.source.get("sha256"):
        return f"{min(doubtful)} was changed"
    return None


def _same_text(spec: CalibrationSpec, manifest: Manifest) -> bool:
    return open_source(spec.data, spec.column).sha256() == (manifest.calibration or {}).get("sha256")


def _source_hash(recipe: Recipe) -> str:
    location = locate(recipe.model)
    if location.graph is None:
        return Checkpoint(location.folder).sha256()
    from ..models.onnx_file import graph_outline

    return GraphSource(location, graph_outline(location)).sha256()


def _other_output(manifest: Manifest, output: Path) -> str | None:
    """Return which file of the artifact is not whole; one that is no newer than the record of its run is not hashed."""
    written = (output / RUN).stat().st_mtime_ns
    every = {output / name: file for name, file in manifest.files.items()}
    for record in manifest.exports:
        every |= {output / record.directory / name: file for name, file in record.files.items()}
    for path, expected in every.items():
        if not path.is_file() or path.stat().st_size != expected.bytes:
            return f"{path} is missing or was changed"
        if path.stat().st_mtime_ns > written and file_record(path) != expected:
            return f"{path} was changed"
    return None


def write_depfile(path: Path, target: Path, inputs: Iterable[Path]) -> None:
    """Write a rule that says what a file was made from, for make's `include` and ninja's `depfile`.

    Raises:
        UsageError: it cannot be written, or a name holds a line break.
    """
    # make takes a first name with `=` for a variable of the target.
    inputs = sorted(inputs, key=lambda name: "=" in str(name))
    for name in (target, *inputs):
        if set("\n;") & set(str(name)) or (inputs and name == inputs[0] and "=" in str(name)):
            hint = "give it by a name without it: a link, or a path from another folder"
            raise UsageError(f"make has no word for the name {str(name)!r}", hint=hint)
    text = f"{_escaped(target)}:" + "".join(f" \\\n  {_escaped(name)}" for name in inputs) + "\n"
    try:
        handle, made = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            Path(made).chmod(0o644)
            Path(made).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(made).unlink()
            raise
    except OSError as error:
        hint = "give the name of a file, in a folder that exists, with --depfile"
        raise UsageError(f"cannot write the depfile to `{path}`", where=error.strerror, hint=hint) from None


def _escaped(name: Path) -> str:
    r"""Return a file name as make and ninja read it: `\ ` for a blank, `\#`, `$$`; backslashes before one are two."""
    made: list[str] = []
    for letter in str(name):
        if letter in " #\t:":
            before = "".join(made)
            slashes = len(before) - len(before.rstrip("\\"))
            made += ["\\"] * (slashes + 1) + [letter]
        else:
            made.append("$$" if letter == "$" else letter)
    return "".join(made)
