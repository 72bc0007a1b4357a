"""Every family through every export, and docs/support.md, which is written from what is found here.

LLMOPT_UPDATE_DOCS=1 pytest tests/pipeline/test_families.py     writes the page, otherwise it is compared
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import assert_near, build, open_model, recipe
from llmopt.core.errors import UsageError
from llmopt.core.passes import PassContext
from llmopt.models.text import batches, random_rows
from llmopt.passes.rtn import Rtn, RtnParams
from llmopt.pipeline.sweep import run_sweep
from llmopt.runtimes.transformers_ import Transformers

PAGE = Path(__file__).parent.parent.parent / "docs" / "support.md"
SYMMETRIC: dict[str, Any] = {"group_size": 32}
ASYMMETRIC: dict[str, Any] = {"group_size": 32, "symmetric": False}


INTRODUCTION = """\
Each family is a tiny random model. *Verified*: the artifact was opened again in its own runtime (transformers, ONNX
Runtime, ONNX Runtime GenAI), every quantized weight read back equals ours bit for bit, and the outputs agree with the
model that was exported: to 0.1 % of the largest where the runtime computes in float32; to a mean KL divergence of 0.01
where it computes with int8 activations (onnx-genai, int4). *Refused*: `llmopt plan` says so, with the reason below,
before any work is done. int4 is `rtn` with groups of 32."""


@dataclass(frozen=True, slots=True)
class Column:
    """An export with what comes before it.

    Attributes:
        title: what the page calls it.
        rounding: parameters of `rtn`, None to leave the weights in float32.
        export: name and parameters.
        decoders_only: the format is for text generators.
    """

    title: str
    rounding: dict[str, Any] | None
    export: tuple[str, dict[str, Any]]
    decoders_only: bool = False


COLUMNS: dict[str, Column] = {
    "packed": Column("safetensors, int4", SYMMETRIC, ("safetensors", {})),
    "packed-asymmetric": Column("safetensors, int4 asymmetric", ASYMMETRIC, ("safetensors", {})),
    "plain": Column("safetensors, int4 as plain float32", SYMMETRIC, ("safetensors", {"format": "plain"})),
    "onnx": Column("onnx, float32", None, ("onnx", {})),
    "genai": Column("onnx-genai, float32", None, ("onnx-genai", {}), decoders_only=True),
    "genai-int4": Column("onnx-genai, int4", SYMMETRIC, ("onnx-genai", {}), decoders_only=True),
}
CELLS = [
    (name, column)
    for name, family in FAMILIES.items()
    for column in COLUMNS
    if family.is_decoder or not COLUMNS[column].decoders_only
]


@pytest.fixture(scope="module")
def found(family, tmp_path_factory):
    """Build a cell once: `found(name, column)` is the artifact's folder and manifest, or the refusal."""
    made = {}

    def build_cell(name, key):
        if (name, key) not in made:
            column = COLUMNS[key]
            passes = [] if column.rounding is None else [("rtn", column.rounding)]
            output = tmp_path_factory.mktemp(f"{name}-{key}") / "artifact"
            try:
                made[name, key] = output, build(recipe(family(name), *passes, export=column.export), output)
            except UsageError as refusal:
                assert not output.exists()
                made[name, key] = output, refusal
        return made[name, key]

    return build_cell


@pytest.mark.parametrize(("name", "key"), CELLS)
def test_verified_or_refused_with_a_reason(name, key, found):
    _, result = found(name, key)
    if isinstance(result, UsageError):
        assert result.where
        assert result.hint
        return
    parity = result.exports[0].verification
    assert parity is not None
    assert parity.passed
    assert parity.positions > 0
    assert parity.weights_equal is (True if COLUMNS[key].rounding and key != "plain" else None)
    if COLUMNS[key].rounding:
        assert sorted(result.passes[0].changed)
        assert result.passes[0].skipped == []


@pytest.mark.parametrize(
    ("name", "key"), [cell for cell in CELLS if cell[1] in {"packed", "packed-asymmetric", "plain"}]
)
def test_transformers_holds_exactly_our_weights(name, key, family, found, tmp_path):
    output, result = found(name, key)
    if isinstance(result, UsageError):
        return
    ours = open_model(family(name), tmp_path)
    run_sweep(ours, [Rtn(RtnParams(**(COLUMNS[key].rounding or {})))], [], PassContext())
    session = Transformers().open(output)
    skeleton, reference = ours.skeleton(), ours.materialize()
    if skeleton.model.main_input_name == "input_ids":
        (batch,) = batches(
            random_rows(200, rows=4, length=24, seed=5), decoder=bool(skeleton.config.is_encoder_decoder)
        )
    else:
        from llmopt.exporters.dummy_inputs import sample_inputs

        batch = dict(sample_inputs(skeleton.model).tensors)
    got = session.outputs({key: value.numpy() for key, value in batch.items()})  # decompresses at the first run
    with torch.no_grad():
        expected = {key: value for key, value in reference(**batch, return_dict=True).items() if torch.is_tensor(value)}
    for view in (view for site in skeleton.sites for view in site.views):
        held = view.of(session.model.get_parameter(view.parameter).data)
        assert held.equal(ours.quantized_weight(view.linear.name).dequantize()), view.linear.name
    first = next(iter(expected))
    assert_near(torch.from_numpy(got[first]), expected[first], what=first, factor=50)


def render(found):
    """Return docs/support.md."""
    reasons: dict[str, int] = {}
    rows = []
    for name, family in FAMILIES.items():
        cells = []
        for key in COLUMNS:
            if (name, key) not in CELLS:
                cells.append("–")
                continue
            _, result = found(name, key)
            if isinstance(result, UsageError):
                number = reasons.setdefault(reason(result), len(reasons) + 1)
                cells.append(f"refused [{number}]")
            else:
                cells.append("verified")
        rows.append(f"| {family.title} | `{family.architecture}` | {' | '.join(cells)} |")
    titles = [column.title for column in COLUMNS.values()]
    return "\n".join(
        [
            "# What is supported",
            "",
            "Written by `LLMOPT_UPDATE_DOCS=1 pytest tests/pipeline/test_families.py` from what it finds; do not edit.",
            "",
            INTRODUCTION.replace("\n", " "),
            "",
            f"| Family | Architecture | {' | '.join(titles)} |",
            f"| --- | --- |{' --- |' * len(titles)}",
            *rows,
            "",
            "## Why",
            "",
            *(f"{number}. {text}" for text, number in reasons.items()),
            "",
        ]
    )


def reason(refusal):
    """Return a refusal as a sentence, without the folder of the test's model."""
    where = "" if "/" in (refusal.where or "/") else f" ({refusal.where})"
    return f"{refusal.what[0].upper()}{refusal.what[1:]}{where}. Instead: {refusal.hint}."


def test_the_page_says_what_was_found(found):
    text = render(found)
    if os.environ.get("LLMOPT_UPDATE_DOCS") == "1":
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.is_file(), "write it with LLMOPT_UPDATE_DOCS=1"
    assert PAGE.read_text(encoding="utf-8") == text, "write it again with LLMOPT_UPDATE_DOCS=1"
