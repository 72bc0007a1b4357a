"""Numbers as people read them."""

import pytest
from llmopt.cli.render import Pairs, Table
from llmopt.cli.views import report_sections
from llmopt.core.numbers import count, labelled, number, plain, seconds, share, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0, "0"),
        (1234567, "1,234,567"),
        (3.14159265, "3.142"),
        (12345.678, "12,346"),
        (0.00123456, "0.001235"),
        (3.14159e-06, "3.14e-06"),
        (1e12, "1e+12"),
        (0.01, "0.01"),
        (-2.5, "-2.5"),
        (9.99999, "10"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_number(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (4_120_000, "3.929 MiB"), (5 * 2**30, "5 GiB")],
)
def test_size(value, text):
    assert size(value) == text


def test_the_rest():
    assert count(6_291_456) == "6.291 M"
    assert share(0.99951) == "99.95 %"
    assert [seconds(value) for value in (0.25, 3.21, 42, 200, 7300)] == [
        "0.25 s",
        "3.2 s",
        "42 s",
        "3 min 20 s",
        "2 h 01 min",
    ]
    assert labelled("load_seconds", 0.25) == ("load", "0.25 s")
    assert labelled("decode_tokens_per_second", 123.456) == ("decode", "123.5 tokens/s")
    assert labelled("sequences_per_second", 8.0) == ("speed", "8 sequences/s")
    assert labelled("mean_kl_nats", 0.25) == ("mean KL", "0.25 nats")
    assert labelled("accuracy_drop_points", 0.1333) == ("accuracy drop", "13.33 points")
    assert labelled("top1_agreement", 0.5) == ("top-1 agreement", "50 %")
    assert labelled("peak_bytes", 2**20) == ("peak", "1 MiB")
    assert plain("x", None) == "-"
    assert plain("x", True) == "yes"
    assert plain("x", ["a", 1]) == "a, 1"


def test_reports_of_any_shape():
    sections = report_sections(
        {
            "path": "x",
            "runs": [{"name": "a", "load_seconds": 1.0}, {"name": "b", "load_seconds": None}],
            "devices": {"cpu": {"there": True}, "gpu": {"there": False}},
            "model": {"blocks": 4, "deep": {"a": 1}},
            "nothing": {},
        }
    )
    assert sections == [
        Pairs("", [("path", "x"), ("nothing", "-")]),
        Table("Runs", ("name", "load"), [["a", "1.0 s"], ["b", "-"]], frozenset({1})),
        Table("Devices", ("", "there"), [["cpu", "yes"], ["gpu", "no"]], frozenset()),
        Pairs("Model", [("blocks", "4")]),
        Pairs("Deep", [("a", "1")]),
    ]
