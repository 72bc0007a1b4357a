"""Gates: how they are written, and what becomes of a measurement."""

import pytest
from llmopt.core.errors import UsageError
from llmopt.evaluation.gates import Measured, gates_of, in_words, judge, parse_gate
from llmopt.evaluation.metrics import METRICS


@pytest.mark.parametrize(
    ("text", "name", "limit", "export"),
    [
        ("perplexity_increase<=2%", "perplexity_increase", 0.02, None),
        ("size_ratio <= 0.35", "size_ratio", 0.35, None),
        ("size_ratio<=35%", "size_ratio", 0.35, None),
        ("onnx-genai:decode_speedup>=1.5", "decode_speedup", 1.5, "onnx-genai"),
        ("decode-speedup>=1.5x", "decode_speedup", 1.5, None),
        ("top1_agreement>=97%", "top1_agreement", 0.97, None),
        ("mean_kl<=1e-2", "mean_kl", 0.01, None),
        ("accuracy>=0.8", "accuracy", 0.8, None),
        ("accuracy_drop<=1%", "accuracy_drop", 0.01, None),
        ("spearman>=0.85", "spearman", 0.85, None),
        ("load_seconds<=2s", "load_seconds", 2.0, None),
        ("load_seconds<=500ms", "load_seconds", 0.5, None),
        ("peak_memory<=2GiB", "peak_memory", 2.0 * 2**30, None),
        ("peak_memory<=800 MB", "peak_memory", 8e8, None),
        ("size<=4096", "size", 4096.0, None),
        ("perplexity<=12.5", "perplexity", 12.5, None),
        ("throughput>=100", "throughput", 100.0, None),
    ],
)
def test_a_gate_is_read(text, name, limit, export):
    gate = parse_gate(text, where="--gate")
    assert (gate.name, gate.limit, gate.export, gate.text) == (name, pytest.approx(limit), export, text)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("perplexity_increas<=2%", "unknown metric `perplexity_increas`", "did you mean `perplexity_increase`?"),
        ("perplexity", "cannot read the gate `perplexity`", "METRIC<=LIMIT"),
        ("size_ratio=0.3", "cannot be limited with `=`", "size_ratio<=0.3"),
        ("size_ratio>=0.3", "cannot be limited with `>=`", "at most"),
        ("accuracy<=80%", "cannot be limited with `<=`", "at least"),
        ("accuracy>=80", "`80` is more than everything", "80%"),
        ("perplexity_increase<=2", "`2` is more than everything", "2%"),
        ("perplexity<=2%", "`2%` is no limit of this metric", "12.5"),
        ("size<=2 apples", "`2 apples` is no limit of this metric", "2GiB"),
        ("load_seconds<=nan", "`nan` is no limit of this metric", "2s"),
    ],
)
def test_a_gate_is_refused(text, message, hint):
    with pytest.raises(UsageError) as refused:
        parse_gate(text, where="--gate")
    assert message in refused.value.what
    assert hint in (refused.value.hint or "")


def test_a_mapping_has_the_natural_direction():
    raw = {"perplexity_increase": "2%", "size_ratio": 0.35, "onnx:decode_speedup": 1.5, "peak_memory": "2GiB"}
    assert gates_of(raw, where="gates") == (
        "perplexity_increase<=2%",
        "size_ratio<=0.35",
        "onnx:decode_speedup>=1.5",
        "peak_memory<=2GiB",
    )
    assert gates_of(["accuracy>=80%"], where="gates") == ("accuracy>=80%",)
    assert gates_of(None, where="gates") == ()


@pytest.mark.parametrize("raw", ["accuracy>=0.8", 3, [1], {"accuracy": [1]}, {"accuracy": True}, {"nothing": 1}])
def test_other_forms_of_gates_are_refused(raw):
    with pytest.raises(UsageError):
        gates_of(raw, where="gates")


@pytest.mark.parametrize(
    ("text", "interval", "verdict"),
    [
        ("perplexity_increase<=2%", (0.01, 0.02), "passed"),
        ("perplexity_increase<=2%", (0.01, 0.021), "undecided"),
        ("perplexity_increase<=2%", (0.019, 0.03), "undecided"),
        ("perplexity_increase<=2%", (0.0201, 0.03), "failed"),
        ("accuracy>=80%", (0.8, 0.9), "passed"),
        ("accuracy>=80%", (0.79, 0.9), "undecided"),
        ("accuracy>=80%", (0.7, 0.79), "failed"),
        ("accuracy>=80%", None, "undecided"),
    ],
)
def test_the_whole_interval_must_lie_within(text, interval, verdict):
    value = 0.85 if interval is None else sum(interval) / 2
    record = judge(parse_gate(text, where=""), Measured(value, interval, 10), export="onnx")
    assert record.verdict == verdict
    assert (record.samples_needed is not None) == (verdict == "undecided")
    assert verdict in in_words(record)
    assert (record.low, record.high) == (interval or (None, None))


def test_what_is_counted_is_never_undecided():
    gate = parse_gate("size_ratio<=0.35", where="")
    assert judge(gate, Measured(0.35, (0.35, 0.35), 0), export="onnx").verdict == "passed"
    assert judge(gate, Measured(0.351, (0.351, 0.351), 0), export="onnx").verdict == "failed"


def test_every_metric_has_words_and_quality_a_statistic():
    for name, metric in METRICS.items():
        assert metric.about, name
        assert (metric.group == "quality") == bool(metric.tasks) == (metric.statistic is not None), name
