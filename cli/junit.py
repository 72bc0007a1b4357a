"""The end of a build as JUnit XML: a case for every verification and every gate, as pipelines show them.

In the form that both Jenkins' schema and the stricter one of Ant's JUnit task take.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from xml.etree import ElementTree as ET

from ..core.errors import UsageError
from ..evaluation.gates import in_words, label

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..core.errors import LlmoptError
    from ..core.manifest import ExportRecord, GateRecord, Manifest, RunRecord

_FORBIDDEN = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold."""


@dataclass(frozen=True, slots=True)
class Case:
    """A test case.

    Attributes:
        group: what it belongs to: "verification", "gates" or "build".
        name: of the case.
        seconds: how long it took.
        outcome: None when it passed.
        kind: of what went wrong, such as "undecided".
        message: what went wrong, or why it was skipped, in a line.
        text: the same at length.
    """

    group: str
    name: str
    seconds: float = 0.0
    outcome: Literal["failure", "error", "skipped"] | None = None
    kind: str = ""
    message: str = ""
    text: str = ""


def cases_of(
    manifest: Manifest | None, run: RunRecord | None, gates: Sequence[str], error: LlmoptError | None
) -> list[Case]:
    """Return the cases of a build that has ended.

    Args:
        manifest: of what was made, None where nothing was.
        run: how it went.
        gates: all that the recipe asks for.
        error: what ended the build.
    """
    seconds = {} if run is None else {step.name: step.seconds for step in run.steps}
    cases = [] if manifest is None else [_verification(record, seconds) for record in manifest.exports]
    measured = [] if run is None else run.gates
    cases += [_gate(gate) for gate in measured]
    known = {gate.text for gate in measured}
    left = "the artifact was not measured" if error is not None else "this process does not write the artifact"
    cases += [Case("gates", text, outcome="skipped", message=left) for text in gates if text not in known]
    if error is not None and not any(case.outcome == "failure" for case in cases):
        kind = type(error).__name__
        cases.append(Case("build", "build", outcome="error", kind=kind, message=error.what, text=str(error)))
    return cases or [Case("build", "build")]


def _verification(record: ExportRecord, seconds: dict[str, float]) -> Case:
    parity, took = record.verification, seconds.get(f"verify {record.name}", 0.0)
    if parity is None:
        return Case("verification", record.name, took, "skipped", message="not verified")
    name = f"{record.name} in {parity.runtime}"
    if parity.passed:
        return Case("verification", name, took)
    figures = {
        "weights equal": parity.weights_equal,
        "max difference": parity.max_difference,
        "mean KL": parity.mean_kl,
        "mean cosine distance": parity.mean_cosine_distance,
        **{f"allowed {limit.replace('_', ' ')}": value for limit, value in parity.tolerance.items()},
    }
    text = "\n".join(f"{label}: {value}" for label, value in figures.items() if value is not None)
    message = "the artifact is not the model that was exported"
    return Case("verification", name, took, "failure", "verification", message, text)


def _gate(gate: GateRecord) -> Case:
    name = label(gate)
    if gate.verdict == "passed":
        return Case("gates", name)
    return Case("gates", name, 0.0, "failure", gate.verdict, in_words(gate), in_words(gate))


def write_junit(path: Path, name: str, cases: Sequence[Case], run: RunRecord | None) -> None:
    """Write the cases.

    Args:
        path: the file.
        name: of the suite.
        cases: at least one.
        run: how the run went, for its time.

    Raises:
        UsageError: the file cannot be written.
    """
    count = {kind: str(sum(case.outcome == kind for case in cases)) for kind in ("failure", "error", "skipped")}
    totals = {"tests": str(len(cases)), "failures": count["failure"], "errors": count["error"]}
    took = f"{0.0 if run is None else run.seconds:.3f}"
    suites = ET.Element("testsuites")
    suite = ET.SubElement(
        suites,
        "testsuite",
        {
            "name": _legal(name),
            "package": "llmopt",
            "id": "0",
            "timestamp": "1970-01-01T00:00:00" if run is None else run.started[:19],
            "hostname": platform.node() or "localhost",
            **totals,
            "skipped": count["skipped"],
            "time": took,
        },
    )
    ET.SubElement(suite, "properties")
    for case in cases:
        place = {"classname": f"llmopt.{case.group}", "name": _legal(case.name), "time": f"{case.seconds:.3f}"}
        element = ET.SubElement(suite, "testcase", place)
        if case.outcome is not None:
            about = {"message": _legal(case.message)} | ({} if case.outcome == "skipped" else {"type": case.kind})
            ET.SubElement(element, case.outcome, about).text = _legal(case.text) or None
    ET.SubElement(suite, "system-out")
    ET.SubElement(suite, "system-err")
    ET.indent(suites)
    try:
        path.write_bytes(ET.tostring(suites, encoding="utf-8", xml_declaration=True) + b"\n")
    except OSError as error:
        hint = "give the name of a file, in a folder that exists, with --junit"
        raise UsageError(f"cannot write the test report to `{path}`", where=error.strerror, hint=hint) from None


def _legal(text: str) -> str:
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
