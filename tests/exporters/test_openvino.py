"""OpenVINO opens what is exported for it, and gives the model's answers."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make_model, make_tokenizer
from helpers import build, recipe
from llmopt.core.errors import UsageError
from llmopt.core.recipe import Step
from llmopt.pipeline.plan import make_plan
from llmopt.runtimes.openvino_ import OpenVino
from msgspec.structs import replace

pytest.importorskip("openvino")


def source(folder: Path, family: str) -> Path:
    make_model(FAMILIES[family]).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_families(family: str, tmp_path: Path):
    folder = source(tmp_path / "model", family)
    manifest = build(recipe(folder, export=("openvino", {})), tmp_path / "out")
    parity = manifest.exports[0].verification
    assert parity is not None
    assert parity.passed
    assert parity.runtime.startswith("openvino ")
    assert set(parity.tolerance) == {"max_difference", "mean_kl"}
    if family == "llama":
        session = OpenVino().open(tmp_path / "out", threads=1)
        prompt = torch.tensor([[5, 9, 200, 31]])
        model = make_model(FAMILIES[family])
        text = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)[0].tolist()
        assert session.generate(prompt[0].tolist(), 6) == text[4:]


def test_bfloat16_is_what_the_file_asks_for(tmp_path: Path):
    folder = source(tmp_path / "model", "bert")
    manifest = build(recipe(folder, export=("openvino", {"dtype": "bfloat16"})), tmp_path / "out")
    parity = manifest.exports[0].verification
    assert parity is not None
    assert parity.passed
    assert "mean_cosine_distance" in parity.tolerance
    assert '<INFERENCE_PRECISION_HINT value="bf16"' in (tmp_path / "out" / "openvino_model.xml").read_text()


def test_attention_of_short_and_of_long_texts(tmp_path: Path):
    """Texts of up to 32 tokens are attended to with other operators; either kind may be missing from a batch."""
    folder = source(tmp_path / "model", "distilbert")
    build(recipe(folder, ("remove-padding", {}), ("fuse", {}), export=("openvino", {})), tmp_path / "out")
    layers = ET.parse(tmp_path / "out" / "openvino_model.xml").getroot().find("layers")
    assert layers is not None
    axes = [layer.find("data").get("axis") for layer in layers if layer.get("type") == "SoftMax"]
    assert sorted(axes) == ["-1"] * 4 + ["2"] * 2  # in each of two layers: two groups of long texts, one of short ones
    session = OpenVino().open(tmp_path / "out", threads=1)
    model = make_model(FAMILIES["distilbert"])
    generator = torch.Generator().manual_seed(0)
    for lengths in ((32, 7, 1), (33, 60, 48), (5, 40, 32, 33, 50), (2,), (41,), (0, 60, 3)):
        places = torch.arange(max(lengths))
        mask = (places < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(3, 270, mask.shape, generator=generator) * mask
        made = session.outputs({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})["last_hidden_state"]
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        difference = (torch.tensor(made) - expected).abs()
        assert difference[mask == 1].max() < 1e-4
        assert (made[mask.numpy() == 0] == 0).all()


def test_packed_codes_are_refused(tmp_path: Path):
    folder = source(tmp_path / "model", "llama")
    made = replace(recipe(folder, export=("openvino", {})), passes=(Step("rtn", {"group_size": 32}),))
    with pytest.raises(UsageError, match="cannot hold int4"):
        make_plan(made)
