"""What `llmopt eval` and `llmopt bench` printed with `--json`, read again."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..core.errors import UsageError
from ..core.manifest import Manifest
from ..evaluation.report.document import Evaluation, Interval, Speed

_MOST = 64 << 20
"""A file of measurements has some kilobytes; more than this is something else."""

_Z95 = 1.959964
_Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures of folders, as files tell them.

    Attributes:
        evals: documents of `llmopt eval`.
        benches: entries of `measured` of `llmopt bench`, each with the machine's description.
    """

    evals: list[_Record]
    benches: list[_Record]

    def evaluations(self, root: Path, manifest: Manifest) -> list[Evaluation]:
        """Return those of an artifact, and of its source where it was evaluated by itself."""
        return [
            Evaluation(
                path=str(one["path"]),
                export=export,
                runtime=str(one.get("runtime", "")),
                data=", ".join(str(one[key]) for key in ("task", "data") if one.get(key)),
                confidence=one["confidence"] if _is_number(one.get("confidence")) else 0.95,
                figures=_metrics(one) or _intervals(one),
            )
            for one in self.evals
            for export in _whose(str(one["path"]), root, manifest)
        ]

    def speeds(self, root: Path, manifest: Manifest) -> list[Speed]:
        """Return those of an artifact, and of its source."""
        return [
            Speed(
                path=str(one["path"]),
                export=export,
                runtime=str(one.get("runtime", "")),
                figures={name: value for name, value in one.items() if _is_number(value)},
                machine=one["machine"],
            )
            for one in self.benches
            for export in _whose(str(one["path"]), root, manifest)
        ]

    def check_used(self, used: Collection[str], artifacts: Sequence[tuple[Path, Manifest]]) -> None:
        """Refuse figures of what is not in the report.

        Raises:
            UsageError: it names the folder that they are of.
        """
        for one in [*self.evals, *self.benches]:
            if one["path"] not in used:
                folders = ", ".join(
                    str(root / record.directory) for root, manifest in artifacts for record in manifest.exports
                )
                raise UsageError(
                    f"`{one['file']}` measures `{one['path']}`, which is not in this report",
                    where=f"the report is of {folders}",
                    hint="run the report from the folder that it was measured from, or leave the file out",
                )


def read_measured(evals: Sequence[Path], benches: Sequence[Path]) -> Measured:
    """Read what `eval` and `bench` printed.

    Raises:
        UsageError: a file cannot be read or holds something else.
    """
    scored: list[_Record] = []
    for file in evals:
        document = _document(file, "eval")
        if not isinstance(document.get("path"), str) or "measured" in document:
            raise _foreign(file, "eval")
        scored.append(document | {"file": str(file)})
    timed: list[_Record] = []
    for file in benches:
        document = _document(file, "bench")
        entries = document.get("measured")
        if not isinstance(entries, list):
            raise _foreign(file, "bench")
        about = {name: document[name] for name in ("threads", "prompt_tokens", "new_tokens") if name in document}
        machine = document.get("machine")
        known = cast("_Record", machine) if isinstance(machine, dict) else {}
        for entry in cast("list[Any]", entries):
            if not isinstance(entry, dict) or not isinstance(cast("_Record", entry).get("path"), str):
                raise _foreign(file, "bench")
            timed.append(cast("_Record", entry) | {"file": str(file), "machine": known | about})
    return Measured(scored, timed)


def _document(file: Path, kind: str) -> _Record:
    try:
        if file.stat().st_size > _MOST:
            raise _foreign(file, kind)
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read `{file}`", where=error.strerror, hint=_how(kind)) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"`{file}` is not JSON", where=str(error)[:200], hint=_how(kind)) from None
    if not isinstance(found, dict):
        raise _foreign(file, kind)
    return cast("_Record", found)


def _foreign(file: Path, kind: str) -> UsageError:
    return UsageError(f"`{file}` is not what `llmopt {kind} --json` prints", hint=_how(kind))


def _how(kind: str) -> str:
    return f"make it with `llmopt {kind} … --json > FILE`"


def _whose(path: str, root: Path, manifest: Manifest) -> list[str | None]:
    """Return the export that a folder is, [None] where it is the source, none where it is neither."""
    place = Path(path).expanduser().resolve()
    for record in manifest.exports:
        if place == (root / record.directory).resolve():
            return [record.name]
    source = str(manifest.source.get("id", ""))
    return [None] if path == source or place == Path(source).expanduser().resolve() else []


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _metrics(document: _Record) -> dict[str, Interval]:
    """Return the figures of a document that lists metrics with intervals of their own, and those of the source."""
    found: dict[str, Interval] = {}
    rows = document.get("metrics")
    for row in cast("list[Any]", rows) if isinstance(rows, list) else []:
        if not isinstance(row, dict):
            continue
        one = cast("_Record", row)
        name, unit = str(one.get("metric", "")), str(one.get("unit") or "")
        ending = {"": "", "ratio": ""}.get(unit, f"_{unit}")
        if not _is_number(one.get("value")):
            continue
        low, high = (one.get(key) if _is_number(one.get(key)) else None for key in ("low", "high"))
        found[name + ending] = Interval(value=one["value"], low=low, high=high)
        if _is_number(one.get("source")):
            found[f"source_{name}{ending}"] = Interval(value=one["source"])
    return found


def _intervals(document: Mapping[str, Any], prefix: str = "") -> dict[str, Interval]:
    """Return the figures of a document of `eval`, with the intervals that their standard errors give."""
    found: dict[str, Interval] = {}
    for name, value in document.items():
        if isinstance(value, dict):
            inner = cast("_Record", value)
            if _is_number(inner.get("value")):
                low, high = (inner.get(key) if _is_number(inner.get(key)) else None for key in ("low", "high"))
                found[prefix + name] = Interval(value=inner["value"], low=low, high=high)
            elif not prefix:
                found |= _intervals(inner, f"{name}_")
        elif _is_number(value) and "stderr" not in name:
            low, high = _limits(name, value, document)
            found[prefix + name] = Interval(value=value, low=low, high=high)
    return found


def _limits(name: str, value: float, document: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Return the 95 % interval of a figure of `eval`: of a loss and what follows from it, and of a divergence."""
    stem, _, unit = name.rpartition("_")
    errors = {"perplexity": "loss_stderr_nats", "perplexity_increase_share": "loss_increase_stderr_nats"}
    error = document.get(errors.get(name, f"{stem}_stderr_{unit}"))
    if not isinstance(error, (int, float)):
        return None, None
    if name == "perplexity":
        return value * math.exp(-_Z95 * error), value * math.exp(_Z95 * error)
    if name == "perplexity_increase_share":
        return (1 + value) * math.exp(-_Z95 * error) - 1, (1 + value) * math.exp(_Z95 * error) - 1
    return max(0.0 if "kl" in name else -math.inf, value - _Z95 * error), value + _Z95 * error
