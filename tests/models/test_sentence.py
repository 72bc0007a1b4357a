"""Sentence-transformers folders: what is read of them, and that pooling is over real tokens."""

from __future__ import annotations

import json
import math

import pytest
import torch
from families import save_sentence_folder
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.core.recipe import ModelSpec
from llmopt.models.locate import locate
from llmopt.models.pooling import WAYS
from llmopt.models.sentence import POOLING, read_sentence

MODES = ["cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]


def naive(way, rows):
    """Pool the real tokens of one text, a loop for each way."""
    count = len(rows)
    if way == "cls":
        return rows[0]
    if way == "lasttoken":
        return rows[-1]
    if way == "max":
        return torch.stack(list(rows)).amax(0)
    if way == "weightedmean":
        return sum((n + 1) * row for n, row in enumerate(rows)) / sum(range(1, count + 1))
    return sum(rows) / (count if way == "mean" else math.sqrt(count))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", POOLING)
def test_only_real_tokens_are_pooled(way, side):
    torch.manual_seed(0)
    states = torch.randn(3, 6, 5) * 10
    mask = torch.zeros(3, 6)
    expected = []
    for row, length in enumerate((6, 1, 4)):
        real = slice(0, length) if side == "right" else slice(6 - length, 6)
        mask[row, real] = 1
        expected.append(naive(way, states[row, real]))
    made = WAYS[way](states, mask)
    assert torch.allclose(made, torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize("way", POOLING)
def test_a_text_without_tokens_gives_numbers(way):
    assert bool(WAYS[way](torch.randn(1, 4, 3), torch.zeros(1, 4)).isfinite().all())


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_read(tmp_path, mode):
    config = {f"pooling_mode_{one}": one == mode for one in MODES}
    folder = save_sentence_folder(tmp_path / "model", pooling={"word_embedding_dimension": 64, **config})
    assert read_sentence(folder).pooling == (mode.removesuffix("_tokens").removesuffix("_token"),)


def test_newer_names_and_several_ways(tmp_path):
    folder = save_sentence_folder(tmp_path / "model", pooling={"pooling_mode": ["mean", "cls"]}, dense=24)
    read = read_sentence(folder)
    assert read.pooling == ("cls", "mean")
    assert [dense.activation for dense in read.dense] == ["Tanh"]
    assert read.normalize


def test_the_transformer_may_have_a_folder_of_its_own(tmp_path):
    folder = save_sentence_folder(tmp_path / "model", transformer="0_Transformer")
    location = locate(ModelSpec(id=str(folder)))
    assert location.folder == folder / "0_Transformer"
    assert location.task == "sentence-similarity"
    made = tmp_path / "made"
    made.mkdir()
    assert location.sentence is not None
    location.sentence.save(made)
    again = read_sentence(made)
    assert again.transformer == made
    assert again.pooling == ("mean",)
    assert json.loads((made / "sentence_bert_config.json").read_text())["max_seq_length"] == 64


def test_another_task_leaves_the_pooling_out(tmp_path):
    folder = save_sentence_folder(tmp_path / "model")
    assert locate(ModelSpec(id=str(folder), task="feature-extraction")).sentence is None


def change(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def unknown_module(folder):
    modules = json.loads((folder / "modules.json").read_text())
    modules[-1]["type"] = "sentence_transformers.models.LSTM"
    (folder / "modules.json").write_text(json.dumps(modules))


def outside(folder):
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = "../elsewhere"
    (folder / "modules.json").write_text(json.dumps(modules))


def pickled(folder):
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: change(folder, "1_Pooling/config.json", pooling_mode_median_tokens=True), "median"),
        (lambda folder: change(folder, "1_Pooling/config.json", pooling_mode_mean_tokens=False), "not named"),
        (lambda folder: change(folder, "2_Dense/config.json", activation_function="my.Swish"), "Swish"),
        (lambda folder: change(folder, "2_Dense/config.json", module_input_name="token_embeddings"), "module_input"),
        (unknown_module, "LSTM"),
        (outside, "leads out"),
        (pickled, "pickle"),
        (lambda folder: (folder / "modules.json").write_text("{}"), "no list"),
        (lambda folder: (folder / "modules.json").write_text("[{]"), "modules.json"),
        (lambda folder: (folder / "1_Pooling" / "config.json").unlink(), "no such file"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, damage, says):
    folder = save_sentence_folder(tmp_path / "model", dense=24)
    damage(folder)
    with pytest.raises(LlmoptError, match=r".") as caught:
        locate(ModelSpec(id=str(folder)))
    assert says in str(caught.value)
    assert caught.value.hint


def test_prompts_that_pooling_leaves_out_are_refused(tmp_path):
    pooling = {"pooling_mode_mean_tokens": True, "include_prompt": False}
    folder = save_sentence_folder(tmp_path / "model", pooling=pooling)
    assert read_sentence(folder).pooling == ("mean",)  # there are no prompts
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "query: "}}))
    with pytest.raises(UsageError, match="not known"):
        read_sentence(folder)
