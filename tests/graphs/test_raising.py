"""Attention and the mask of the padding, found in what torch's own exporters write."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from llmopt.graphs.attention import Mask, attentions
from llmopt.graphs.mask_trial import hides_padding
from llmopt.graphs.padding import remove_padding
from llmopt.graphs.raising import raise_attention
from llmopt.graphs.shapes import infer_shapes
from llmopt.graphs.token_index import Layout
from running import PADDED, largest_difference, names, run, written

HEADER = '<ir_version: 10, opset_import: ["" : 20]>'
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "attention", "dynamo"),
    [
        ("bert", "eager", False),
        ("roberta", "sdpa", True),
        pytest.param("bert", "sdpa", False, marks=SLOW),
        pytest.param("bert", "sdpa", True, marks=SLOW),
        pytest.param("distilbert", "eager", True, marks=SLOW),
        pytest.param("distilbert", "sdpa", False, marks=SLOW),
    ],
)
def test_padding_can_be_removed_from_an_exported_graph(family: str, attention: str, dynamo: bool, foreign: Any):
    model = ir.load(foreign(family, attention=attention, dynamo=dynamo))
    before, answers = names(model), run(model)
    infer_shapes(model)
    assert raise_attention(model) == 2
    assert all(Mask.of(each.mask) is not None and each.scale == 0.25 for each in attentions(model))
    assert largest_difference(answers, run(model)) < 1e-5
    report = remove_padding(model, Layout(2))
    assert (report.attentions, report.left) == (2, [])
    made = run(model)
    assert names(model) == before
    if made[0].ndim == 3:
        real = PADDED.astype(bool)
        assert not made[0][~real].any()
        made, answers = [made[0][real]], [answers[0][real]]
    assert largest_difference(answers, made) < 1e-5


HIDDEN = "f = Cast <to: int = 1> (attention_mask) g = Sub (one, f)"
SEEN = "b = Cast <to: int = 9> (attention_mask)"
MASKS = {
    "(1 - mask) * lowest": (f"{HIDDEN} h = Mul (g, low) m = Unsqueeze (h, axes)", None, True),
    "where": (f"{SEEN} c = Unsqueeze (b, axes) m = Where (c, zero, low)", None, True),
    "boolean": (f"{SEEN} m = Unsqueeze (b, axes)", True, True),
    "boolean, hidden": ("b = Equal (attention_mask, none) m = Unsqueeze (b, axes)", False, True),
    "the wrong way round": (f"{HIDDEN} h = Mul (f, low) m = Unsqueeze (h, axes)", None, False),
    "boolean, the wrong way round": (f"{SEEN} m = Unsqueeze (b, axes)", False, False),
    "a soft mask": (f"{HIDDEN} h = Mul (g, soft) m = Unsqueeze (h, axes)", None, False),
    "by the query": (f"{HIDDEN} h = Mul (g, low) m = Unsqueeze (h, other)", None, False),
}


@pytest.mark.parametrize("title", MASKS)
def test_masks_are_told_by_what_they_hide(title: str):
    body, seen, expected = MASKS[title]
    constants = {
        "one": np.float32(1),
        "zero": np.float32(0),
        "low": np.float32(-3e38),
        "soft": np.float32(-5),
        "none": np.int64(0),
        "axes": np.array([1, 2]),
        "other": np.array([1, 3]),
    }
    used = {name: value for name, value in constants.items() if f"({name}," in body or f", {name}" in body}
    kind = "bool" if seen is not None else "float"
    text = f"{HEADER} g (int64[batch, sequence] attention_mask) => ({kind}[A, B, C, D] m) {{ {body} }}"
    model = written(text, **used)
    infer_shapes(model)
    assert hides_padding(model, model.graph.outputs[0], seen=seen) is expected
