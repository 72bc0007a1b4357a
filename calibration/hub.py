"""Reading data sets through the `datasets` library: from the hub, its cache, or a local folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.errors import LlmoptError, UsageError, nearest
from .records import Record

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".arrow": "arrow"}

_SPEC = re.compile(r"(?P<name>([A-Za-z]:[\\/])?[^:\[\]]+)(:(?P<split>[\w.-]+(\[[^\[\]]*\])?))?")
_PART = re.compile(r"[\w][\w.-]*")


class HubSpec(NamedTuple):
    """What stands behind `hf:`.

    Attributes:
        name: `name` or `org/name` on the hub, or a local path.
        config: the configuration, also called subset.
        split: the split, maybe with a slice as in `train[:1000]`.
        local: whether `name` is a path.
    """

    name: str
    config: str | None
    split: str | None
    local: bool


def parse_hub_spec(spec: str) -> HubSpec:
    """Read `hf:NAME[/CONFIG][:SPLIT]`.

    Two parts are always `org/name`, as everywhere on the hub: a configuration follows a full name only. A name that
    begins with `.`, `~` or `/`, or exists here, is a local path, as it is for `datasets`.

    Raises:
        UsageError: it has another form.
    """
    match = _SPEC.fullmatch(spec.removeprefix("hf:"))
    name = match["name"] if match else ""
    path = Path(name).expanduser()
    if match and name and (name[0] in "./~\\" or path.exists()):
        if not path.exists():
            raise UsageError(f"no file or folder `{path}`", where=f"calibration data `{spec}`", hint="check the path")
        return HubSpec(str(path), None, match["split"], local=True)
    parts = name.split("/")
    if not match or len(parts) > 3 or not all(_PART.fullmatch(part) for part in parts):
        raise UsageError(
            f"cannot read `{spec}` as a data set",
            hint="write hf:NAME[/CONFIG][:SPLIT], as in hf:Salesforce/wikitext/wikitext-2-raw-v1:train",
        )
    return HubSpec("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, match["split"], local=False)


def hub_records(spec: str) -> Iterator[Record]:
    """Yield the rows of a data set, streaming where the library can.

    Raises:
        UsageError: no such data set, configuration or split.
        LlmoptError: it cannot be reached or read.
    """
    import datasets
    from datasets import config
    from datasets.exceptions import DatasetsError

    hub = parse_hub_spec(spec)
    datasets.disable_progress_bars()
    try:
        yield from (Record(f"row {number}", row) for number, row in enumerate(_rows(hub, spec), start=1))
    except FileNotFoundError as error:  # DatasetNotFoundError and DataFilesNotFoundError are such errors
        raise UsageError(
            f"no data set `{hub.name}`",
            where=_first_line(error),
            hint="write the full name, as in hf:Salesforce/wikitext/wikitext-2-raw-v1; log in first where it is gated",
        ) from error
    except OSError as error:
        offline = config.HF_HUB_OFFLINE
        raise LlmoptError(
            f"cannot reach data set `{hub.name}`",
            where="HF_HUB_OFFLINE is set, and the data set is not in the cache" if offline else _first_line(error),
            hint="download it once where the hub can be reached, or name a local file",
        ) from error
    except (ValueError, RuntimeError, DatasetsError) as error:
        raise LlmoptError(
            f"cannot read data set `{hub.name}`",
            where=_first_line(error),
            hint="check the name, its configuration and its split: hf:NAME[/CONFIG][:SPLIT]",
        ) from error


def _rows(hub: HubSpec, spec: str) -> Iterable[Mapping[str, Any]]:
    import datasets
    from datasets import config

    name = hub.name
    options: dict[str, Any] = {}
    path = Path(name)
    if hub.local and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        return _split(datasets.load_from_disk(name), hub.split, spec)
    if hub.local and path.is_file():
        if path.suffix not in BUILDERS:
            raise UsageError(
                f"`{path}` is of a kind that `datasets` is not asked to read", hint=f"known: {', '.join(BUILDERS)}"
            )
        options["data_files"] = name
        name = BUILDERS[path.suffix]
    if hub.split and "[" in hub.split:  # streams cannot be sliced
        return datasets.load_dataset(name, hub.config, split=hub.split, **options)
    streaming = hub.local or not config.HF_HUB_OFFLINE  # without the hub, `datasets` reads only its cache
    options["streaming"] = streaming
    return _split(datasets.load_dataset(name, hub.config, **options), hub.split, spec)


def _split(loaded: Any, split: str | None, spec: str) -> Iterable[Mapping[str, Any]]:
    """Return the split asked for; without one, `train` or the only one."""
    if not isinstance(loaded, dict):  # a data set saved without splits
        return loaded
    wanted = split or ("train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else None)
    if wanted in loaded:
        return loaded[wanted]
    known = ", ".join(str(name) for name in loaded)
    if wanted is None:
        raise UsageError(f"`{spec}` has several splits", where=f"splits: {known}", hint=f"name one: {spec}:SPLIT")
    raise UsageError(
        f"no split `{wanted}` in `{spec}`", where=f"splits: {known}", hint=nearest(wanted, map(str, loaded))
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
