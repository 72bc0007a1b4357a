"""A pipeline that does nothing but answer, for tests of the shell around it."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from llmopt.core.errors import UsageError
from llmopt.core.facts import LinearFacts, ModelFacts
from llmopt.core.manifest import ExportRecord, FileRecord, Manifest, Parity, PassRecord
from llmopt.core.plan import Plan, PlanStep

from llmopt.__main__ import main

FACTS = ModelFacts(
    source="./tiny",
    model_type="llama",
    architecture="LlamaForCausalLM",
    dtype="float32",
    parameters=1_030_000,
    bytes=4_120_000,
    largest_block_bytes=400_000,
    outside_bytes=1_000_000,
    blocks=4,
    linears=tuple(LinearFacts(name=f"layers.{index}", out_features=64, in_features=64) for index in range(28)),
    has_tokenizer=True,
    config={},
)


def plan(recipe: Any) -> Plan:
    steps = [PlanStep(kind="pass", title=step.name, detail=f"{step.params}") for step in recipe.passes]
    steps += [PlanStep(kind="export", title=step.name, detail=f"{step.params}") for step in recipe.exports]
    return Plan(
        recipe=recipe,
        facts=FACTS,
        steps=tuple(steps),
        skips=(("lm_head", "not in a repeated block"),),
        peak_bytes=300_000_000,
        output_bytes=900_000,
    )


def record(name: str, directory: str = ".") -> ExportRecord:
    return ExportRecord(
        name=name,
        directory=directory,
        params={},
        notes=["the embedding is kept in float32"],
        verification=Parity(
            runtime="transformers 5.23.1",
            samples="held-out calibration text",
            positions=2048,
            weights_equal=True,
            max_difference=3.1415926e-06,
            mean_kl=1.25e-9,
            top1_agreement=0.99951,
            tolerance={"max_difference": 1e-3},
            passed=True,
        ),
        files={"model.safetensors": FileRecord(bytes=900_000, sha256="0" * 64)},
    )


def manifest(recipe: Any) -> Manifest:
    names = [step.name for step in recipe.exports]
    return Manifest(
        llmopt="0.1.0",
        recipe=recipe.to_dict(),
        seed=recipe.seed,
        source={"id": FACTS.source, "architecture": FACTS.architecture, "bytes": FACTS.bytes},
        calibration=None,
        versions={},
        passes=[
            PassRecord(
                name=step.name,
                params=step.params,
                changed=[item.name for item in FACTS.linears],
                skipped=[("lm_head", "not in a repeated block")],
                metrics={"damping_max_ratio": 0.01},
                notes=[],
            )
            for step in recipe.passes
        ],
        exports=[record(name, name if len(names) > 1 else ".") for name in names],
    )


def install(monkeypatch: Any) -> dict[str, Any]:
    """Put the fakes in the place of pipeline/ and return what they are called with."""
    calls: dict[str, Any] = {}

    def make_plan(recipe: Any, **_: Any) -> Plan:
        calls["recipe"] = recipe
        if recipe.model.id == "missing":
            raise UsageError("no such model", where="missing", hint="name a folder")
        return plan(recipe)

    def run_plan(plan: Any, output: Any, *, force: bool, reporter: Any, cache: Any) -> Manifest:
        calls["run"], calls["cache"] = {"output": output, "force": force}, cache
        with reporter.step("quantize", 4) as step:
            for index in range(4):
                step.advance(detail=f"layers.{index}")
        reporter.note("a note")
        reporter.warn("a warning")
        return manifest(plan.recipe)

    def dump_recipe(recipe: Any, path: Any) -> None:
        path.write_text(str(recipe.to_dict()))

    def report(*arguments: Any, **named: Any) -> dict[str, Any]:
        calls["report"] = (arguments, named)
        return {"path": str(arguments[0]) if arguments else "", "load_seconds": 0.25, "size_bytes": 1536, "ratio": 1.5}

    def evaluate(*arguments: Any, **named: Any) -> dict[str, Any]:
        row = {"metric": "accuracy", "value": 0.5, "low": 0.25, "high": 0.75, "unit": "share", "source": 0.625}
        return {**report(*arguments, **named), "confidence": 0.95, "metrics": [row]}

    modules = {
        "plan": {"make_plan": make_plan},
        "run": {"run_plan": run_plan},
        "recipe": {"load_recipe": lambda path: calls["loaded"], "dump_recipe": dump_recipe, "recipe_schema": dict},
        "verify": {"verify": lambda directory, *, reporter: [record("safetensors")]},
        "measuring.evaluate": {"evaluate": evaluate},
        "bench": {"bench": report},
        "infer": {"infer": report},
        "inference": {"InferOptions": dict},
        "inspect": {"inspect": report},
        "doctor": {"doctor": report},
        "demo": {"demo": report},
    }
    for name, members in modules.items():
        module = ModuleType(f"llmopt.pipeline.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def pipeline(monkeypatch: Any) -> dict[str, Any]:
    return install(monkeypatch)


@pytest.fixture
def manifest_of() -> Any:
    """Return the function that makes a manifest of a recipe."""
    return manifest


@pytest.fixture
def llmopt(capsys: Any, monkeypatch: Any) -> Any:
    """Run a command line in this process, and leave the process as it was."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> Ended:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        environment = dict(os.environ)
        try:
            with warnings.catch_warnings():
                code = main(arguments)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.environ.clear()
            os.environ.update(environment)
        return Ended(code, *capsys.readouterr())

    return run
