"""What becomes of an artifact that is not the model that was exported, or does not meet a gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..core.errors import UnmetError
from ..core.manifest import ExportRecord, GateRecord, Parity
from ..evaluation.gates import in_words as gate_in_words
from ..evaluation.gates import label
from .output import Staging


def refuse(exports: Sequence[ExportRecord], gates: Sequence[GateRecord], stage: Staging, output: Path) -> None:
    """Set an artifact aside that is not the model, or does not meet a gate.

    Raises:
        UnmetError: it says what, and where it lies.
    """
    _refuse_unmet(exports, stage, output)
    _refuse_gates(gates, stage, output)


def _refuse_unmet(exports: Sequence[ExportRecord], stage: Staging, output: Path) -> None:
    unmet = unverified(exports)
    if not unmet:
        return
    failed = stage.set_aside()
    raise UnmetError(
        f"the artifact is not the model that was exported ({', '.join(record.name for record in unmet)})",
        where="\n".join(map(judged, unmet)),
        hint=f"it lies at {failed} for a look; nothing was written to {output}",
        artifact=failed,
    )


def unverified(exports: Sequence[ExportRecord]) -> list[ExportRecord]:
    """Return those that are not the model that was exported."""
    return [
        record
        for record in exports
        if any(parity is not None and not parity.passed for parity in (record.verification, record.adapted))
    ]


def _refuse_gates(gates: Sequence[GateRecord], stage: Staging, output: Path) -> None:
    unmet = [(label(gate), gate_in_words(gate)) for gate in gates if gate.verdict != "passed"]
    if not unmet:
        return
    failed = stage.set_aside()
    raise UnmetError(
        f"{len(unmet)} of {len(gates)} gates {'was' if len(unmet) == 1 else 'were'} not met",
        where="\n".join(f"{gate}: {words}" for gate, words in unmet),
        hint=f"the artifact lies at {failed} for a look; nothing was written to {output}",
        artifact=failed,
        unmet=unmet,
    )


def judged(record: ExportRecord) -> str:
    """Return the figures of an export, and what is allowed, in a line; one more where it has an adapter."""
    beside = {record.name: record.verification, f"{record.name} with its adapter": record.adapted}
    return "\n".join(_judged(name, parity) for name, parity in beside.items() if parity is not None)


def _judged(name: str, parity: Parity) -> str:
    limits = {"mean_kl": "mean KL"}
    allowed = ", ".join(
        f"{limits.get(key, key.replace('_', ' '))} {limit:g}" for key, limit in parity.tolerance.items()
    )
    return f"{name} in {parity.runtime}: {in_words(parity)}; allowed {allowed}"


def in_words(parity: Parity) -> str:
    """Return the figures of a comparison in a line."""
    parts = [f"max difference {parity.max_difference:.3g}"]
    if parity.mean_kl is not None:
        parts.append(f"mean KL {parity.mean_kl:.3g}")
    if parity.top1_agreement is not None:
        parts.append(f"top-1 agreement {parity.top1_agreement:.2%}")
    if "mean_cosine_distance" in parity.tolerance and parity.mean_cosine_distance is not None:
        parts.append(f"mean cosine distance {parity.mean_cosine_distance:.3g}")
    if parity.weights_equal is not None:
        parts.append("weights equal bit for bit" if parity.weights_equal else "weights NOT equal")
    return ", ".join(parts)
