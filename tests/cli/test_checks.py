"""Gates on the command line, and the end of a build as pipelines read it: JUnit XML, annotations, plain text."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest
from llmopt.cli.annotations import command
from llmopt.cli.junit import Case, cases_of, write_junit
from llmopt.core.errors import LlmoptError, UnmetError
from llmopt.core.manifest import MANIFEST, RUN, GateRecord, Machine, RunRecord, StepRecord
from llmopt.core.recipe import EvaluationSpec, ModelSpec, Recipe, Step


def gate(verdict, text="mean_kl<=0.01", **changes):
    made = {"value": 0.02, "low": 0.015, "high": 0.03, "limit": 0.01, "samples": 9, "samples_needed": None}
    return GateRecord(
        **{"text": text, "metric": "mean_kl", "comparison": "<=", "unit": "nats", "verdict": verdict, **made},
        against="source",
        export="safetensors",
    )


GATES = [gate("passed", "mean_kl<=1"), gate("failed"), gate("undecided", "mean_kl<=0.02 & <b>")]
RECORD = RunRecord(
    started="2026-01-02T03:04:05+00:00",
    seconds=12.5,
    cpu_seconds=20.0,
    peak_memory_bytes=1 << 30,
    machine=Machine(processor="p", cores=2, memory_bytes=None, system="s"),
    threads=2,
    steps=[StepRecord(name="rtn", seconds=1.0), StepRecord(name="verify safetensors", seconds=2.25)],
    gates=GATES,
)
RECIPE = Recipe(model=ModelSpec(id="model"), exports=(Step("safetensors"),), gates=tuple(one.text for one in GATES))


@pytest.fixture
def unmet(pipeline, manifest_of, monkeypatch):
    """Let runs end with gates that are not met."""

    def run_plan(plan, output, *, force, reporter, cache):
        aside = Path(f"{output}.failed")
        aside.mkdir()
        (aside / MANIFEST).write_bytes(msgspec.json.encode(manifest_of(plan.recipe)))
        (aside / RUN).write_bytes(msgspec.json.encode(RECORD))
        missed = [("mean_kl<=0.01 (safetensors)", "failed: 100%, too much"), ("mean_kl<=0.02", "undecided")]
        raise UnmetError("2 of 3 gates were not met", where="figures", hint="look", artifact=aside, unmet=missed)

    monkeypatch.setattr(sys.modules["llmopt.pipeline.run"], "run_plan", run_plan)


def test_gates_reach_the_recipe(llmopt, pipeline, tmp_path):
    arguments = ["--gate", "perplexity_increase<=2%", "--gate", "size_ratio<=0.35", "--gate-data", "test.txt"]
    more = ["--gate-task", "perplexity", "--gate-column", "text", "--gate-confidence", "90%"]
    assert llmopt("quantize", "model", "-o", str(tmp_path / "out"), *arguments, *more).code == 0
    recipe = pipeline["recipe"]
    assert recipe.gates == ("perplexity_increase<=2%", "size_ratio<=0.35")
    spec = EvaluationSpec(data="test.txt", task="perplexity", columns={"": "text"}, confidence=0.9)
    assert recipe.evaluation == (spec,)


def test_gates_of_the_command_line_come_behind_those_of_the_recipe(llmopt, pipeline, tmp_path):
    evaluation = EvaluationSpec(data="a.txt", length=64)
    pipeline["loaded"] = Recipe(
        model=ModelSpec(id="m"), exports=(Step("onnx"),), gates=("size<=1GiB",), evaluation=(evaluation,)
    )
    assert (
        llmopt("run", "r.yaml", "-o", str(tmp_path / "o"), "--gate", "perplexity<=9", "--gate-data", "b.txt").code == 0
    )
    assert pipeline["recipe"].gates == ("size<=1GiB", "perplexity<=9")
    assert pipeline["recipe"].evaluation == (EvaluationSpec(data="b.txt", length=64),)


def test_several_test_data_are_an_evaluation_each(llmopt, pipeline, tmp_path):
    gates = ["--gate", "perplexity<=9", "--gate", "accuracy@q>=60%", "--gate-confidence", "90%"]
    data = ["--gate-data", "a.txt", "--gate-data", "q.jsonl"]
    tasks = ["--gate-task", "perplexity", "--gate-task", "multiple-choice"]
    command = ["quantize", "model", "-o", str(tmp_path / "out"), *gates, *data]
    assert llmopt(*command, *tasks).code == 0
    assert pipeline["recipe"].evaluation == (
        EvaluationSpec(data="a.txt", task="perplexity", confidence=0.9),
        EvaluationSpec(data="q.jsonl", task="multiple-choice", confidence=0.9),
    )
    assert llmopt(*command, *tasks[:2]).code == 0
    assert [one.task for one in pipeline["recipe"].evaluation] == ["perplexity"] * 2
    for more, message in (
        ([*tasks, "--gate-task", "generate"], "it is not clear which task is for which data"),
        (["--gate-column", "a=b"], "--gate-column with 2 --gate-data"),
    ):
        ended = llmopt(*command, *more)
        assert (ended.code, ended.out) == (2, "")
        assert message in ended.err


def test_options_do_not_choose_among_a_recipes_evaluations(llmopt, pipeline, tmp_path):
    evaluation = (EvaluationSpec(data="a.txt"), EvaluationSpec(data="b.txt"))
    gates = ("perplexity<=9",)
    pipeline["loaded"] = Recipe(model=ModelSpec(id="m"), exports=(Step("onnx"),), gates=gates, evaluation=evaluation)
    ended = llmopt("run", "r.yaml", "-o", str(tmp_path / "o"), "--gate-data", "c.txt")
    assert ended.code == 2
    assert ended.err.startswith("error: the recipe has 2 evaluations")
    assert llmopt("run", "r.yaml", "-o", str(tmp_path / "o"), "--gate", "size<=9").code == 0
    assert pipeline["recipe"].evaluation == evaluation


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gate", "perplexty<=9"], "unknown metric `perplexty`"),
        (["--gate", "size_ratio>=0.3"], "`size_ratio` cannot be limited with `>=`"),
        (["--gate-data", "t.txt"], "--gate-data without a gate"),
        (["--gate", "size<=9", "--gate-confidence", "120%"], "bad value for --gate-confidence: 120%"),
        (
            ["--gate", "size<=9", "--gate-column", "a=b", "--gate-column", "a=c"],
            "--gate-column names two columns",
        ),
    ],
)
def test_bad_gates_are_refused(llmopt, pipeline, arguments, message):
    ended = llmopt("quantize", "model", "-o", "out", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"error: {message}")
    assert "run" not in pipeline


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["--dry-run"], ["--depfile", "out.d"]),
        (["--dry-run"], ["--if-changed"]),
        (["--no-cache"], ["--cache-dir", "cache"]),
    ],
)
def test_options_that_leave_each_other_nothing_to_do(llmopt, pipeline, first, second):
    for begun in (["quantize", "model"], ["export", "model"], ["run", "r.yaml"]):
        ended = llmopt(*begun, "-o", "out", *first, *second)
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith(f"error: {first[0]} and {second[0]} exclude each other")
    assert "run" not in pipeline


def test_the_recipe_is_written_also_where_nothing_is_built(llmopt, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("llmopt.cli.building._is_current", lambda *_: True)
    monkeypatch.chdir(tmp_path)
    assert llmopt("quantize", "model", "-o", "out", "--if-changed", "--save-recipe", "r.yaml").code == 0
    assert "rtn" in (tmp_path / "r.yaml").read_text()
    assert "run" not in pipeline


def test_gates_that_are_not_met_are_shown_and_end_with_3(llmopt, unmet, tmp_path):
    ended = llmopt("quantize", "model", "-o", str(tmp_path / "out"))
    assert ended.code == 3
    lines = ended.out.splitlines()
    assert lines[0] == "Gates"
    assert [line.split()[-1] for line in lines[2:]] == ["passed", "FAILED", "UNDECIDED"]
    assert "0.015 nats to 0.03 nats" in lines[3]
    assert ended.err.startswith("note: ")
    assert "error: 2 of 3 gates were not met" in ended.err
    assert "\x1b" not in ended.out + ended.err


def test_json_is_one_document_with_what_was_not_met(llmopt, unmet, tmp_path):
    ended = llmopt("quantize", "model", "-o", str(tmp_path / "out"), "--json")
    document = json.loads(ended.out)
    assert document["artifact"] == str(tmp_path / "out.failed")
    assert [one["gate"] for one in document["unmet"]] == ["mean_kl<=0.01 (safetensors)", "mean_kl<=0.02"]


@pytest.mark.parametrize("as_json", [False, True])
def test_annotations_go_to_stderr_alone(llmopt, unmet, tmp_path, monkeypatch, as_json):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    ended = llmopt("quantize", "model", "-o", str(tmp_path / "out"), *(["--json"] if as_json else []))
    assert ended.err.splitlines()[-2:] == [
        "::error title=mean_kl<=0.01 (safetensors)::failed: 100%25, too much",
        "::error title=mean_kl<=0.02::undecided",
    ]
    assert "::error" not in ended.out


def test_any_error_is_annotated_in_one_line(llmopt, pipeline, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    ended = llmopt("quantize", "missing", "-o", "out")
    assert ended.err.splitlines()[-1] == "::error title=no such model::missing%0Aname a folder"
    monkeypatch.delenv("GITHUB_ACTIONS")
    assert "::error" not in llmopt("quantize", "missing", "-o", "out").err


def test_a_title_cannot_end_early():
    assert command("error", "a: b, c", "50%\nx") == "::error title=a%3A b%2C c::50%25%0Ax"


def read(path):
    """Return the suite, checked against what the schemas of Jenkins and of Ant's task ask for."""
    root = ET.parse(path).getroot()
    assert root.tag == "testsuites"
    (suite,) = root
    required = {"name", "package", "id", "timestamp", "hostname", "tests", "failures", "errors", "time"}
    assert required <= suite.attrib.keys() <= required | {"skipped"}
    assert len(suite.attrib["timestamp"]) == len("2026-01-02T03:04:05")
    assert suite[0].tag == "properties"
    assert [child.tag for child in suite][-2:] == ["system-out", "system-err"]
    cases = list(suite)[1:-2]
    assert {case.tag for case in cases} == {"testcase"}
    for case in cases:
        assert case.attrib.keys() == {"classname", "name", "time"}
        assert len(case) <= 1
    outcomes = [case[0].tag if len(case) else None for case in cases]
    for tag, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        assert suite.attrib[attribute] == str(outcomes.count(tag))
    assert suite.attrib["tests"] == str(len(cases))
    return suite, [(case.attrib["name"], outcome) for case, outcome in zip(cases, outcomes, strict=True)]


def test_junit_has_a_case_for_each_verification_and_gate(tmp_path, manifest_of):
    path = tmp_path / "report.xml"
    write_junit(path, "llmopt out", cases_of(manifest_of(RECIPE), RECORD, RECIPE.gates, UnmetError("gates")), RECORD)
    suite, cases = read(path)
    assert cases == [
        ("safetensors in transformers 5.23.1", None),
        ("mean_kl<=1 (safetensors)", None),
        ("mean_kl<=0.01 (safetensors)", "failure"),
        ("mean_kl<=0.02 & <b> (safetensors)", "failure"),
    ]
    assert suite[1].attrib["time"] == "2.250"
    assert suite.attrib["time"] == "12.500"
    assert [case[0].attrib["type"] for case in suite if len(case)] == ["failed", "undecided"]


def test_junit_of_a_failed_verification_skips_the_gates(tmp_path, manifest_of):
    made = manifest_of(RECIPE)
    record = made.exports[0]
    failed = msgspec.structs.replace(record.verification, passed=False, weights_equal=False)
    made = msgspec.structs.replace(made, exports=[msgspec.structs.replace(record, verification=failed)])
    run = msgspec.structs.replace(RECORD, gates=[])
    write_junit(tmp_path / "r.xml", "x", cases_of(made, run, RECIPE.gates, UnmetError("verification")), run)
    assert [outcome for _, outcome in read(tmp_path / "r.xml")[1]] == ["failure", "skipped", "skipped", "skipped"]


def test_junit_of_an_error_and_of_characters_that_xml_lacks(tmp_path):
    cases = cases_of(None, None, (), LlmoptError("bad \x00 \x1b[31m byte"))
    write_junit(tmp_path / "r.xml", "x", cases, None)
    assert read(tmp_path / "r.xml")[1] == [("build", "error")]
    write_junit(tmp_path / "r.xml", "x", [Case("build", "b")], None)
    assert read(tmp_path / "r.xml")[1] == [("b", None)]


@pytest.mark.parametrize(("model", "code", "outcome"), [("model", 0, None), ("missing", 2, "error")])
def test_junit_is_written_whatever_the_end(llmopt, pipeline, tmp_path, model, code, outcome):
    path = tmp_path / "report.xml"
    assert llmopt("quantize", model, "-o", str(tmp_path / "out"), "--junit", str(path)).code == code
    assert read(path)[1] == [("build", outcome)]


def test_junit_is_written_when_gates_are_not_met(llmopt, unmet, tmp_path):
    path = tmp_path / "report.xml"
    assert llmopt("quantize", "model", "-o", str(tmp_path / "out"), "--junit", str(path)).code == 3
    assert [outcome for _, outcome in read(path)[1]] == [None, None, "failure", "failure"]


def test_eval_passes_its_options_on(llmopt, pipeline, tmp_path):
    arguments = [
        "--task",
        "multiple-choice",
        "--column",
        "question=q",
        "--column",
        "answer=a",
        "--limit",
        "9",
        "--confidence",
        "90%",
    ]
    ended = llmopt("eval", "p", "--data", "d.csv", *arguments, "--samples", "s.jsonl", "--json")
    assert ended.code == 0, ended.err
    (path,), named = pipeline["report"]
    options = named["options"]
    assert (path, options.data, options.task) == ("p", "d.csv", "multiple-choice")
    assert options.columns == {"question": "q", "answer": "a"}
    assert (options.samples.limit, options.confidence, options.write) == (9, 0.9, Path("s.jsonl"))


def test_a_report_that_cannot_be_written_does_not_hide_the_verdict(llmopt, unmet, tmp_path):
    ended = llmopt("quantize", "model", "-o", str(tmp_path / "out"), "--junit", str(tmp_path / "no" / "r.xml"))
    assert ended.code == 3
    assert "warning: cannot write the test report" in ended.err
    assert "error: 2 of 3 gates were not met" in ended.err
