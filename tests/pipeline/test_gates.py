"""Gates in a run: refused in the plan, measured after the verification, and an artifact that fails stands aside."""

from __future__ import annotations

import json
import subprocess

import msgspec
import pytest
from families import save_sentence_folder
from helpers import recipe
from llmopt.core.errors import LlmoptError, UnmetError, UsageError
from llmopt.core.manifest import RUN, RunRecord
from llmopt.core.progress import Silent
from llmopt.core.recipe import CalibrationSpec, EvaluationSpec
from llmopt.pipeline.cache import keys
from llmopt.pipeline.cache.store import CacheSettings, Store
from llmopt.pipeline.measuring import gating
from llmopt.pipeline.output import file_records
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.recipe import load_recipe
from llmopt.pipeline.run import run_plan
from msgspec.structs import replace

RTN = ("rtn", {"bits": 4, "group_size": 32})


class Heard(Silent):
    def __init__(self):
        self.said = []

    def note(self, message):
        self.said.append(message)

    def warn(self, message):
        self.said.append(f"warning: {message}")


def gated(folder, *gates, evaluation=None, **options):
    given = [evaluation] if isinstance(evaluation, dict) else evaluation or []
    specs = tuple(EvaluationSpec(**one) for one in given)
    return replace(recipe(folder, RTN, **options), gates=gates, evaluation=specs)


def run(made, output, reporter=None):
    manifest = run_plan(make_plan(made), output, force=False, reporter=reporter or Silent())
    return manifest, read_run(output)


def read_run(output):
    return msgspec.json.decode((output / RUN).read_bytes(), type=RunRecord)


def test_gates_that_are_met(family, text, tmp_path):
    heard = Heard()
    made = gated(
        family("llama"),
        "perplexity_increase<=50%",
        "size_ratio<=60%",
        "mean_kl<=1",
        evaluation={"data": str(text), "length": 24, "samples": 20},
    )
    manifest, record = run(made, tmp_path / "out", heard)
    assert [gate.verdict for gate in record.gates] == ["passed"] * 3
    assert [gate.against for gate in record.gates] == ["source"] * 3
    assert [gate.samples for gate in record.gates] == [20, 0, 20]
    increase = record.gates[0]
    assert increase.low < increase.value < increase.high <= increase.limit
    assert any(f"perplexity on {text}, 20 samples, in transformers" in line for line in heard.said)
    # What is asked for is in the manifest; what was measured, which may differ each time, is not.
    assert manifest.recipe["gates"] == list(made.gates)
    assert "verdict" not in (tmp_path / "out" / "llmopt.json").read_text()
    assert [step.name for step in record.steps][-1] == "gates"


def test_a_gate_that_fails_puts_the_artifact_aside(family, text, tmp_path):
    made = gated(
        family("llama"),
        "size_ratio<=1%",
        "size_ratio<=90%",
        "top1_agreement>=99.99%",
        evaluation={"data": str(text), "length": 24, "samples": 20},
    )
    with pytest.raises(UnmetError) as unmet:
        run(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    aside = tmp_path / "out.failed"
    assert unmet.value.artifact == aside
    assert unmet.value.exit_code == 3
    verdicts = {gate.text: gate.verdict for gate in read_run(aside).gates}
    assert verdicts["size_ratio<=1%"] == "failed"
    assert verdicts["size_ratio<=90%"] == "passed"  # all are measured
    assert "size_ratio<=1% (safetensors): failed" in unmet.value.where
    assert "top1_agreement>=99.99% (safetensors, text): failed" in unmet.value.where
    assert "size_ratio<=90%" not in unmet.value.where
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.failed"]
    records = file_records(aside)
    manifest = json.loads((aside / "llmopt.json").read_text())
    for name, record in manifest["exports"][0]["files"].items():
        assert records[name].sha256 == record["sha256"]


def test_too_few_samples_leave_a_gate_undecided(family, text, tmp_path):
    evaluation = {"data": str(text), "length": 24, "samples": 3}
    with pytest.raises(UnmetError) as unmet:
        run(gated(family("llama"), "perplexity<=1000000", evaluation=evaluation), tmp_path / "out")
    (gate,) = read_run(tmp_path / "out.failed").gates
    assert (gate.verdict, gate.low, gate.high, gate.samples_needed) == ("undecided", None, None, 5)
    assert "5 would decide" in unmet.value.where


def test_a_gate_for_one_export(family, tmp_path):
    made = gated(family("llama"), "onnx:size_ratio<=1%", "size_ratio<=90%")
    made = replace(made, exports=(*made.exports, replace(made.exports[0], name="onnx")))
    with pytest.raises(UnmetError):
        run(made, tmp_path / "out")
    found = [(gate.export, gate.text) for gate in read_run(tmp_path / "out.failed").gates]
    assert found == [("onnx", "onnx:size_ratio<=1%"), ("safetensors", "size_ratio<=90%"), ("onnx", "size_ratio<=90%")]


def test_speed_is_measured_in_pairs(family, tmp_path):
    gates = ("prefill_speedup>=0.0001", "peak_memory<=64GiB", "load_seconds<=99")
    _, record = run(gated(family("llama"), *gates, evaluation={"repeats": 5}), tmp_path / "out")
    assert [gate.verdict for gate in record.gates] == ["passed"] * 3
    assert all(gate.samples == 5 and gate.low <= gate.value <= gate.high for gate in record.gates)
    assert [gate.against for gate in record.gates] == ["source", None, None]
    assert 50e6 < record.gates[1].value < 1e9  # not what this process has


def test_the_source_is_asked_once_for_all_exports(tmp_path, monkeypatch):
    save_sentence_folder(tmp_path / "model")
    data = tmp_path / "pairs.csv"
    lines = [f"one {n},two {n * n % 7},{n % 5}" for n in range(12)]
    data.write_text("\n".join(lines) + "\n")
    asked = []
    ask_one = gating.ask_one
    monkeypatch.setattr(gating, "ask_one", lambda *given: asked.append(given[1].name) or ask_one(*given))
    base = recipe(tmp_path / "model", export=("onnx", {}))
    exports = (base.exports[0], replace(base.exports[0], name="safetensors"))
    evaluation = (EvaluationSpec(data=str(data)),)
    made = replace(base, exports=exports, gates=("spearman_drop<=1%", "spearman>=-1"), evaluation=evaluation)
    _, record = run(made, tmp_path / "out")
    assert asked == ["onnx", "source", "safetensors"]
    assert [gate.verdict for gate in record.gates] == ["passed"] * 4
    assert {gate.text: gate.value for gate in record.gates}["spearman_drop<=1%"] == pytest.approx(0, abs=1e-6)


def test_bad_test_data_is_met_before_the_work(family, tmp_path, monkeypatch):
    data = tmp_path / "q.jsonl"
    rows = [{"question": "a", "choices": ["x", "y"], "answer": answer} for answer in (0, 1, 7)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = gated(family("llama"), "accuracy>=10%", evaluation={"data": str(data)})
    monkeypatch.setattr("llmopt.pipeline.run.run_passes", lambda *_, **__: pytest.fail("the work was begun"))
    with pytest.raises(UsageError, match="line 3"):
        run(made, tmp_path / "out")


@pytest.mark.parametrize(
    ("gates", "evaluation", "message", "hint"),
    [
        (["perplexity<=9"], None, "needs test data", "--gate-data"),
        (["spearman>=0.8"], "text", "`spearman` cannot be measured of", "perplexity"),
        (["throughput>=1"], None, "cannot be measured", "decode_speedup"),
        (["onx:size<=1GiB"], None, "no export `onx`", "safetensors"),
        (["accuracy>=0.8", "perplexity<=9"], "text", "belong to several tasks", "a list under `evaluation`"),
        (["accuracy>=0.8"], "text", "cannot tell which column of", "--column"),
        (["perplexity<=9"], "nowhere.txt", "no file `nowhere.txt`", ""),
        (["accuracy>=0.8"], "rows", "cannot tell which column", "answer"),
    ],
)
def test_the_plan_refuses(family, text, tmp_path, gates, evaluation, message, hint):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "a", "choices": ["x", "y"]}\n')
    data = {"text": str(text), "rows": str(rows)}.get(evaluation, evaluation)
    task = "multiple-choice" if evaluation == "rows" else None
    made = gated(family("llama"), *gates, evaluation=None if data is None else {"data": data, "task": task})
    with pytest.raises(UsageError) as refused:
        make_plan(made)
    assert message in refused.value.what
    assert hint in str(refused.value)


def test_the_plan_lists_gates_in_order(family, text):
    gates = ("size_ratio<=60%", "perplexity_increase<=2%", "load_seconds<=9")
    plan = make_plan(gated(family("llama"), *gates, evaluation={"data": str(text)}))
    steps = [step for step in plan.steps if step.kind == "gate"]
    assert [step.title for step in steps] == list(gates)
    assert f"perplexity on {text}, against the source" in steps[1].detail


def test_calibration_data_as_test_data_is_not_taken_in_silence(family, text, tmp_path):
    heard = Heard()
    made = gated(family("llama"), "perplexity<=1000000", evaluation={"data": str(text), "length": 24, "samples": 6})
    run(replace(made, calibration=CalibrationSpec(data=str(text), samples=2, length=24)), tmp_path / "out", heard)
    assert any(line.startswith("warning: the gates' test data is the calibration data") for line in heard.said)


def test_a_failed_verification_measures_no_gates(family, tmp_path, monkeypatch):
    from llmopt.pipeline import exporting as module

    def wrong(*given, **named):
        return replace(compare(*given, **named), passed=False)

    compare = module.compare
    monkeypatch.setattr(module, "compare", wrong)
    with pytest.raises(UnmetError, match="not the model that was exported"):
        run(gated(family("llama"), "size_ratio<=60%"), tmp_path / "out")
    assert read_run(tmp_path / "out.failed").gates == []


def test_a_recipe_says_the_same_either_way(tmp_path):
    (tmp_path / "a.yaml").write_text(
        'model: m\ngates: {perplexity_increase: "2%", size_ratio: 0.35}\nevaluation: {data: t.txt, confidence: 0.9}\n'
    )
    (tmp_path / "b.yaml").write_text(
        "model: m\ngates:\n  - perplexity_increase<=2%\n  - size_ratio<=0.35\n"
        "evaluation: {data: t.txt, confidence: 0.9}\n"
    )
    first, second = (load_recipe(tmp_path / name) for name in ("a.yaml", "b.yaml"))
    assert first == second
    assert first.to_dict()["evaluation"] == {"data": "t.txt", "confidence": 0.9}


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"question": "the hen lays", "choices": ["an egg", "a stone"], "answer": n % 2} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_each_gate_is_measured_with_the_data_that_give_its_metric(family, text, questions, tmp_path):
    evaluation = [{"data": str(text), "length": 24, "samples": 6}, {"data": questions}]
    made = gated(family("llama"), "accuracy>=0%", "perplexity<=1000000", "size_ratio<=1", evaluation=evaluation)
    manifest, record = run(made, tmp_path / "out")
    found = [(gate.metric, gate.evaluation, gate.samples, gate.verdict) for gate in record.gates]
    assert found == [
        ("accuracy", "questions", 8, "passed"),
        ("perplexity", "text", 6, "passed"),
        ("size_ratio", None, 0, "passed"),
    ]
    assert manifest.recipe["evaluation"] == evaluation


def test_a_gate_holds_for_all_data_that_give_its_metric_or_the_one_it_names(family, text, tmp_path):
    other = tmp_path / "other text.txt"
    other.write_text("egg stone hen " * 200)
    evaluation = [{"data": str(one), "length": 24, "samples": 6} for one in (text, other)]
    gates = ("perplexity<=1000000", "perplexity_increase@other-text<=99%", "mean_kl<=9")
    _, record = run(gated(family("llama"), *gates, evaluation=evaluation), tmp_path / "out")
    assert [(gate.metric, gate.evaluation) for gate in record.gates] == [
        ("perplexity", "text"),
        ("perplexity", "other-text"),
        ("perplexity_increase", "other-text"),
        ("mean_kl", "text"),
        ("mean_kl", "other-text"),
    ]
    first, second = (gate.value for gate in record.gates[:2])
    assert first != second


def test_names_and_the_evaluation_for_speed(family, text, tmp_path):
    data = {"data": str(text), "length": 24}
    evaluation = [{**data, "samples": 6, "name": "short"}, {**data, "samples": 8, "name": "long"}, {"repeats": 6}]
    gates = ("perplexity@long<=1000000", "perplexity@short<=1000000", "prefill_speed>=0.0001")
    _, record = run(gated(family("llama"), *gates, evaluation=evaluation), tmp_path / "out")
    assert [(gate.evaluation, gate.samples) for gate in record.gates] == [("long", 8), ("short", 6), (None, 6)]


@pytest.mark.parametrize(
    ("gates", "evaluation", "message"),
    [
        (["perplexity<=9"], ["text", "text"], "two evaluations are called `text`"),
        (["perplexity@txt<=9"], ["text", "questions"], "no evaluation `txt`"),
        (["exact_match>=1%"], ["text", "questions"], "no evaluation gives `exact_match`, which needs generate"),
        (["perplexity<=9"], ["text", "questions"], "no gate is measured with"),
        (["size<=1GiB"], ["text"], "`data` of an evaluation is not heeded"),
        ([], ["text"], "`data` of an evaluation is not heeded"),
        (["perplexity<=9"], [{"repeats": 9}, "text"], "`repeats` of an evaluation is not heeded"),
        (["load_seconds<=9"], [{"length": 9}], "`length` of an evaluation is not heeded"),
        (["size@text<=1GiB"], ["text"], "`size` is not measured with test data"),
    ],
)
def test_the_plan_refuses_what_is_not_used(family, text, questions, gates, evaluation, message):
    data = {"text": str(text), "questions": questions}
    specs = [one if isinstance(one, dict) else {"data": data[one]} for one in evaluation]
    with pytest.raises(UsageError) as refused:
        make_plan(gated(family("llama"), *gates, evaluation=specs))
    assert message in refused.value.what


def test_a_recipe_names_evaluations_in_a_list(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "model: m\ngates: {perplexity@wiki: 9, 'onnx:accuracy@mmlu': 60%}\nevaluation:\n  - {data: wiki.txt}\n"
        "  - {data: 'hf:org/name:test', name: mmlu}\n"
    )
    made = load_recipe(tmp_path / "r.yaml")
    assert made.gates == ("perplexity@wiki<=9", "onnx:accuracy@mmlu>=60%")
    assert [one.label for one in made.evaluation] == ["wiki", "mmlu"]
    assert made.to_dict()["evaluation"] == [{"data": "wiki.txt"}, {"data": "hf:org/name:test", "name": "mmlu"}]
    for wrong in ("evaluation: [wiki.txt]", "evaluation: {data: t.txt, name: a b}", "evaluation: 3"):
        (tmp_path / "r.yaml").write_text(f"model: m\n{wrong}\n")
        with pytest.raises(UsageError, match="bad value in the parameters"):
            load_recipe(tmp_path / "r.yaml")


def test_quality_is_measured_once(family, text, tmp_path, cache, monkeypatch):
    data = tmp_path / "t.txt"
    data.write_text(text.read_text())
    asked = []
    ask = gating.ask
    monkeypatch.setattr(gating, "ask", lambda *given: asked.append(given[1].name) or ask(*given))

    def gates_of(output, *gates, source=None, **evaluation):
        heard = Heard()
        spec = {"data": str(data), "length": 24, "samples": 6, **evaluation}
        made = make_plan(gated(source or family("llama"), *gates, evaluation=spec))
        run_plan(made, tmp_path / output, force=False, reporter=heard, cache=CacheSettings(cache))
        return read_run(tmp_path / output).gates, [line for line in heard.said if line.startswith("gates of")]

    first, said = gates_of("a", "mean_kl<=9", "size_ratio<=1")
    assert "from the cache" not in said[0]
    again, said = gates_of("b", "mean_kl<=9", "size_ratio<=1")
    assert (again, len(asked)) == (first, 1)
    assert said[0].startswith(f"gates of safetensors with {data}: from the cache, ")
    other, _ = gates_of("c", "mean_kl<=8")  # another limit of the same figure
    assert (other[0].value, other[0].limit, len(asked)) == (first[0].value, 8, 1)
    gates_of("d", "mean_kl<=9", samples=7)
    gates_of("e", "mean_kl<=9", confidence=0.9)
    gates_of("f", "mean_kl<=9", "perplexity<=1000000")
    gates_of("g", "mean_kl<=9", source=family("llama", hidden_size=32))
    data.write_text(data.read_text() + "egg\n")
    gates_of("h", "mean_kl<=9")
    assert len(asked) == 6
    known = keys.versions()
    monkeypatch.setattr(keys, "versions", lambda: known | {"torch": "0"})
    gates_of("i", "mean_kl<=9")
    assert len(asked) == 7


def test_figures_of_data_that_change_are_not_kept(family, text, tmp_path, cache, monkeypatch):
    data = tmp_path / "t.txt"
    data.write_text(text.read_text())
    ask = gating.ask

    def changing(*given):
        data.write_text("other\n" * 400)
        return ask(*given)

    monkeypatch.setattr(gating, "ask", changing)
    made = gated(family("llama"), "mean_kl<=9", evaluation={"data": str(data), "length": 24, "samples": 6})
    with pytest.raises(LlmoptError, match="was changed while it was read"):
        run_plan(make_plan(made), tmp_path / "out", force=False, reporter=Silent(), cache=CacheSettings(cache))
    assert [entry.title for entry in Store(cache).shown()] == ["rtn"]


def test_make_stops(family, tmp_path, resident_llmopt):
    """The recipe of `after` needs the artifact; a gate that is not met keeps make from going on to it."""
    command = f"{resident_llmopt} quantize {family('llama')} -o $@ -q --group-size 32"
    rules = f"after: good\n\ttouch after\ngood:\n\t{command} --gate 'size_ratio<=$(LIMIT)'\n"
    (tmp_path / "Makefile").write_text(rules)
    ended = subprocess.run(["make", "LIMIT=1%"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "Error 3" in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Makefile", "good.failed"]
