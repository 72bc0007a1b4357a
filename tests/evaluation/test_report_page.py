"""The page: its numbers are the document's, what comes from files stays text, it asks for nothing, it can be read."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest
from llmopt.core import numbers
from llmopt.evaluation.report import charts
from llmopt.evaluation.report.axes import axis
from llmopt.evaluation.report.card import card
from llmopt.evaluation.report.document import Point, Report
from llmopt.evaluation.report.markup import Markup, element, joined
from llmopt.evaluation.report.page import page

EVIL = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")
CSS = (Path(charts.__file__).parent / "style.css").read_text()


def layer_map(figure="relative_error", blocks=4, kinds=("self_attn.q_proj", "mlp.down_proj"), stack="model.layers"):
    cells = [[0.03 + 0.01 * block + 0.007 * at for at in range(len(kinds))] for block in range(blocks)]
    if figure == "bits":
        cells = [[2 + (block + at) % 3 for at in range(len(kinds))] for block in range(blocks)]
    cells[0][-1] = None
    known = [value for row in cells for value in row if value is not None]
    return {
        "figure": figure,
        "stack": stack,
        "blocks": list(range(blocks)),
        "kinds": list(kinds),
        "cells": cells,
        "low": min(known),
        "high": max(known),
        "highest": f"{stack}.{blocks - 1}.{kinds[-1]}",
    }


def gate(verdict, value, low, high, limit, **others):
    known = {"text": f"a {verdict} gate<=2%", "metric": "perplexity_increase", "comparison": "<=", "unit": "share"}
    known |= {"verdict": verdict, "samples": 40, "against": "source", "export": "onnx"}
    return known | {"value": value, "low": low, "high": high, "limit": limit} | others


def entry(name="small", evil=""):
    parity = {"runtime": f"onnxruntime 1.31.0{evil}", "positions": 512, "weights_equal": True, "passed": True}
    parity |= {"max_difference": 0.0312, "mean_kl": 1.25e-5, "top1_agreement": 0.9951, "tolerance": {"mean_kl": 0.01}}
    return {
        "name": name + evil,
        "path": f"./{name}{evil}",
        "llmopt": "0.1.0",
        "summary": f"LlamaForCausalLM made from tiny{evil} by gptq, 4 bits; for onnx.",
        "source": {
            "id": f"models/tiny{evil}",
            "architecture": "LlamaForCausalLM",
            "parameters": 1234567,
            "bytes": 4938268,
            "parts": {"embeddings": 1000448, "attention": 1300480, "mlp": 2600960, "norms": 4608},
            "sha256": "ab" * 32,
        },
        "calibration": {"source": f"wiki.txt{evil}", "samples": 64, "tokens": 8192},
        "recipe": f"model: tiny{evil}\n",
        "seed": 7,
        "passes": [
            {
                "name": f"distill{evil}",
                "export": None,
                "params": {"steps": "150"},
                "changed": 29,
                "left_out": 57,
                "skipped": [{"reason": f"no{evil}", "count": 57, "names": [f"a.1{evil}", "b.2"], "more": 55}],
                "metrics": {"held_out_kl_after_nats": 0.6897, f"odd{evil}_count": 3},
                "notes": [f"stopped after 130 of 150 steps{evil}"],
                "curve": [
                    {"step": 0, "held_out_kl": 2.071},
                    {"step": 10, "learning_rate": 0.001, "kl": 1.81},
                    {"step": 20, "learning_rate": 0.0005, "kl": 0.93},
                    {"step": 20, "held_out_kl": 0.6897},
                ],
            }
        ],
        "layers": {"count": 28, "bits_per_weight": 4.25, "median_relative_error": 0.0912},
        "exports": [
            {
                "name": "onnx",
                "directory": ".",
                "files": 8,
                "size_bytes": 1405786,
                "share": 0.2847,
                "parts": {"attention": 400000, "mlp": 800000, "files": 205786},
                "notes": [f"rounded to int8{evil}"],
                "verification": parity,
                "load": [{"engine": "ONNX Runtime", "language": "python", "code": f"open('{evil}')"}],
            }
        ],
        "size_path": [
            {"name": "source", "size_bytes": 4938268, "share": 1.0, "quality": {}},
            {
                "name": f"gptq{evil}",
                "size_bytes": 1200111,
                "share": 0.243,
                "quality": {"held_out_kl_after_nats": 0.6897},
            },
        ],
        "maps": [layer_map(), layer_map("bits", stack=f"model.layers{evil}")],
        "run": {
            "started": "2026-11-22T02:08:11Z",
            "seconds": 41.27,
            "cpu_seconds": 55.1,
            "peak_memory_bytes": 912345678,
            "machine": {"processor": f"CPU 9000{evil}", "cores": 2, "memory_bytes": 25769803776, "system": "Linux 6.1"},
            "threads": 1,
            "steps": [
                {"name": "distill", "seconds": 31.4, "cpu_seconds": 42.5, "peak_memory_bytes": 812345678},
                {"name": "gptq", "seconds": 0.02, "cached": True, "seconds_saved": 1.61, "blocks_resumed": 3},
            ],
            "gates": [
                gate("passed", 0.012, 0.009, 0.015, 0.02, confidence=0.9),
                gate("undecided", 0.019, 0.014, 0.024, 0.02, samples_needed=640),
                gate("failed", 0.033, None, None, 0.02, text=f"x{evil}"),
            ],
        },
        "evaluations": [
            {
                "path": "small",
                "export": "onnx",
                "runtime": f"onnxruntime 1.31.0{evil}",
                "data": "heldout.txt",
                "figures": {"perplexity": {"value": 8.123, "low": 7.9, "high": 8.41}, "tokens": {"value": 5120}},
            }
        ],
        "speeds": [
            {
                "path": "small",
                "export": "onnx",
                "runtime": "onnxruntime 1.31.0",
                "figures": {"decode_tokens_per_second": 213.7, "load_seconds": 0.347, "peak_memory_bytes": 300456789},
                "machine": {"processor": f"CPU 9000{evil}", "cores": 2, "threads": 2},
            }
        ],
        "versions": {"torch": "2.13.0+cpu", f"x{evil}": f"1.2{evil}"},
        "warnings": [f"something to know{evil}"],
    }


def point(name, size, quality, latency, *, source=False):
    low, high = (None, None) if quality is None else (quality - 0.2, quality + 0.2)
    known = {"quality": quality, "quality_low": low, "quality_high": high, "latency_ms": latency}
    return {"name": name, "is_source": source, "size_bytes": size, **known}


def document(*entries, points=()):
    data = {"llmopt": "0.1.0", "artifacts": list(entries), "points": list(points)}
    data |= {"quality": "perplexity", "latency": "a generated token"} if points else {"quality": None, "latency": None}
    return msgspec.convert(data, Report)


ONE = document(entry())
THREE = document(
    entry("one"),
    entry("two"),
    entry("three"),
    points=[
        point("one", 1405786, 8.123, 4.68),
        point("two", 2405786, 7.111, 9.01),
        point("three", 1905786, None, 6.66),
        point("tiny", 4938268, 7.05, 12.5, source=True),
    ],
)
HOSTILE = document(
    entry("bad", EVIL), entry("worse", EVIL), points=[point(EVIL, 5, 1.5, 2.5), point("y", 7, 2.5, None)]
)


class Reader(HTMLParser):
    """Collects text, tags and attributes, and sees that tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.ticks, self.tags, self.attributes = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag != "meta":
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag, name = self.open[-1] if self.open else ("", "")
        if tag != "style" and data.strip():
            (self.ticks if "tick" in name.split() else self.texts).append(data)


def read(html):
    reader = Reader()
    reader.feed(html)
    assert not reader.open
    return reader


def tokens_of(value, name=""):
    """Return the numbers that a value shows, in any way in which the page may write it."""
    if isinstance(value, dict):
        keys = set(NUMBER.findall(" ".join(map(str, value))))
        return keys.union(*(tokens_of(item, key) for key, item in value.items()))
    if isinstance(value, list):
        return set().union(*(tokens_of(item, name) for item in value))
    if isinstance(value, str):
        return set(NUMBER.findall(value))
    if value is None or isinstance(value, bool):
        return set()
    ways = (numbers.number, numbers.size, numbers.share, numbers.seconds, lambda one: numbers.plain(name, one), str)
    return {token for way in ways for token in NUMBER.findall(way(value))}


WORDS = {"1"}
"""The numbers of the page's own words: `top-1`."""


@pytest.mark.parametrize("report", [ONE, THREE, HOSTILE], ids=["one", "three", "hostile"])
def test_every_number_on_the_page_is_in_the_document(report):
    known = tokens_of(json.loads(msgspec.json.encode(report))) | WORDS
    shown = {token for text in read(page(report)).texts for token in NUMBER.findall(text)}
    assert len(shown) > 75
    assert shown <= known, shown - known


def test_the_check_of_numbers_would_see_a_foreign_one():
    known = tokens_of(json.loads(msgspec.json.encode(ONE))) | WORDS
    foreign = page(ONE).replace("41 s altogether", "47 s altogether")
    assert {token for text in read(foreign).texts for token in NUMBER.findall(text)} - known == {"47"}


def test_what_comes_from_files_stays_text():
    reader = read(page(HOSTILE))
    assert not {"script", "img"} & set(reader.tags)
    assert not any(name.startswith("on") for _, name, _ in reader.attributes)
    assert sum(EVIL in text for text in reader.texts) > 30


@pytest.mark.parametrize("report", [ONE, THREE, HOSTILE], ids=["one", "three", "hostile"])
def test_nothing_is_asked_for_from_elsewhere(report):
    reader = read(page(report))
    assert not {"script", "link", "iframe", "img", "object", "embed", "image", "use"} & set(reader.tags)
    names = {(tag, name) for tag, name, _ in reader.attributes if name in ("src", "href", "srcset", "data", "action")}
    assert names <= {("a", "href")}
    assert all(value.startswith("#") for tag, name, value in reader.attributes if (tag, name) == ("a", "href"))
    assert "url(" not in CSS
    assert "@import" not in CSS


def test_every_plot_says_what_it_shows():
    html = page(THREE)
    plots = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(plots) >= 3 + 3 * (2 + 1 + 3)
    for one in plots:
        drawn = ET.fromstring(one)
        assert drawn.get("role") == "img"
        assert drawn.find("title").text
        assert len(drawn.find("desc").text) > 10
        assert drawn.find("title").text in drawn.get("aria-label")
    ids = re.findall(r'id="([^"]*)"', html)
    assert len(ids) == len(set(ids)) == 3
    assert {f"#{one}" for one in ids} == set(re.findall(r'href="([^"]*)"', html))


def test_verdicts_are_signs_and_words_too():
    html = page(ONE)
    for words in ("✓ passed", "✕ failed", "? undecided"):
        assert words in html
    assert "about 640 are needed" in html


def test_a_report_without_measurements_says_how_to_get_them():
    bare = entry()
    bare |= {
        "maps": [],
        "run": None,
        "evaluations": [],
        "speeds": [],
        "layers": None,
        "passes": [],
        "calibration": None,
    }
    html = page(document(bare, bare | {"name": "other"}))
    assert "Give measurements with --eval and --bench" in html
    assert "llmopt.run.json does not lie in the artifact" in html
    assert "No pass changed the model" in html


def test_a_thousand_layers_with_long_names():
    kinds = [f"a_module_with_a_very_long_name_{at}.and_a_projection_with_a_longer_one" for at in range(7)]
    stack = "model." + "very_" * 30 + "long"
    long = entry() | {"maps": [layer_map(blocks=1000, kinds=kinds, stack=stack)]}
    reader = read(page(document(long)))
    assert reader.tags.count("rect") > 6990
    for tag, name, value in reader.attributes:
        if tag == "text" and name == "x":
            assert -1 <= float(value) <= charts.WIDTH + 1


# Plots


@pytest.mark.parametrize("values", [(1,), (0,), (-3, 5), (0.00123, 0.00124), (1e9, 3e12), (5, 5), (-2, -2)])
@pytest.mark.parametrize("zero", [True, False])
def test_an_axis_holds_its_values_between_round_ends(values, zero):
    made = axis(values, 10, 110, zero=zero)
    assert made.low <= min(values) <= max(values) <= made.high
    assert 3 <= len(made.ticks) <= 8
    assert (made.at(made.low), made.at(made.high)) == (10, 110)
    first, *others = [after - before for before, after in pairwise(made.ticks)]
    assert others == pytest.approx([first] * len(others), rel=1e-6)


def test_labels_are_moved_apart():
    moved = charts._apart([50, 50, 51, 52, 100], 14, 0, 110)
    assert sorted(moved) == moved
    assert all(after - before >= 14 for before, after in pairwise(moved))
    assert max(moved) <= 110


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["self_attn.q_proj", "mlp.up_proj"], ["q_proj", "up_proj"]),
        (["attention.output.dense", "output.dense"], ["attention.output.dense", "output.dense"]),
        (["a.x", "b.x", "c"], ["a.x", "b.x", "c"]),
    ],
)
def test_names_are_shortened_as_far_as_they_stay_apart(names, short):
    assert charts.short_names(names) == short


def test_a_long_name_loses_its_middle():
    assert charts.clipped("x" * 16, 16) == "x" * 16
    assert charts.clipped("the_beginning_and_the_end", 12) == "the_…the_end"


def test_a_name_keeps_off_other_points():
    points = [
        Point(**point("left", 100, 5.0, 1.0)),
        Point(**point("near", 130, 5.02, 1.0)),
        Point(**point("z", 900, 9, 1.0)),
    ]
    size, quality = charts.Measure("size", lambda one: one.size_bytes), charts.Measure("loss", lambda one: one.quality)
    drawn = ET.fromstring(charts.scatter("t", points, size, quality))
    circles = [(float(one.get("cx")), float(one.get("cy"))) for one in drawn.iter("circle")]
    for group in (one for one in drawn.iter("g") if one.get("class") == "label"):
        label = group.find("text")
        x, y, width = float(label.get("x")), float(label.get("y")) - 4, 6.2 * len(label.find("title").text)
        left = x if group.get("text-anchor") == "start" else x - width
        assert not any(left < cx < left + width and abs(cy - y) < 8 for cx, cy in circles)


# Markup


def test_markup_is_escaped_once():
    inner = element("b", '1 < 2 & "x"')
    assert inner == '<b>1 &lt; 2 &amp; "x"</b>'
    assert element("p", inner, None, ["<", Markup("<i>")], title='"<', data_label="a") == (
        '<p title="&quot;&lt;" data-label="a"><b>1 &lt; 2 &amp; "x"</b>&lt;<i></p>'
    )
    assert element("rect", x=1.25, y=2.0, class_="h1") == '<rect x="1.25" y="2" class="h1"/>'
    assert joined("a", [Markup("<b>"), "<"]) == "a<b>&lt;"


# Colours


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


THEMES = [
    dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
][:2]


@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(theme):
    for name in ("ink", "soft", "main", "good", "bad", "doubt"):
        assert contrast(theme[name], theme["paper"]) >= 4.5, name
    assert contrast(theme["ink"], theme["tint"]) >= 4.5
    for shade in range(5):
        assert contrast(theme["ink"], theme[f"h{shade}"]) >= 4.5, shade
    assert contrast("#15181b", theme["h5"]) >= 4.5
    for shade in range(6, 9):
        assert contrast(theme["paper"], theme[f"h{shade}"]) >= 4.5, shade


@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark"])
def test_shades_go_one_way(theme):
    shades = [luminance(theme[f"h{shade}"]) for shade in range(9)]
    assert shades in (sorted(shades), sorted(shades, reverse=True))


# Model card


def header_of(text):
    import yaml

    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_has_the_metadata_of_the_hub():
    local = header_of(card(ONE.artifacts[0]))
    assert local["library_name"] == "onnx"
    assert local["pipeline_tag"] == "text-generation"
    assert "base_model" not in local  # a folder's name is no repository
    assert "mixed-precision" in local["tags"]
    hub = entry()
    hub["source"] |= {"id": "org/tiny", "revision": "c0ffee", "license": "apache-2.0"}
    made = header_of(card(document(hub).artifacts[0]))
    assert made["base_model"] == "org/tiny"
    assert made["base_model_relation"] == "quantized"
    assert made["license"] == "apache-2.0"


def test_a_card_has_neither_times_nor_machines():
    text = card(ONE.artifacts[0])
    assert "2026-11-22" not in text
    assert "CPU 9000" not in text.replace("213.7", "")
    assert "41 s" not in text
    later = entry()
    later["run"]["seconds"] = 99.0
    assert card(document(later).artifacts[0]) == text


def test_nothing_in_a_card_becomes_a_tag_or_breaks_a_table():
    evil = EVIL + "|`x`\n# heading"
    text = card(document(entry("bad", evil)).artifacts[0])
    prose = re.sub(r"```.*?```", "", text.split("---\n", 2)[2], flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<(script|img)", prose)
    for line in prose.splitlines():
        assert not line.startswith("# heading")
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4, 6, 11)
    assert header_of(text)["tags"]
