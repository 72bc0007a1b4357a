"""Which class a task means, and which tasks the weights of a checkpoint fit."""

from __future__ import annotations

import pytest
from families import save_head, save_sentence_folder
from llmopt.core.errors import UsageError
from llmopt.core.recipe import TASKS, ModelSpec
from llmopt.models.checkpoint import Checkpoint
from llmopt.models.locate import locate
from llmopt.models.outline import outline
from llmopt.models.tasks import check_task

FITTING = {
    ("bert", "BertForSequenceClassification"): {"text-classification", "feature-extraction"},
    ("bert", "BertForTokenClassification"): {"token-classification", "feature-extraction"},
    ("bert", "BertForQuestionAnswering"): {"question-answering", "feature-extraction"},
    ("bert", "BertForMaskedLM"): {"fill-mask", "feature-extraction"},
    ("bert", "BertForPreTraining"): {"fill-mask", "feature-extraction"},
    ("bert", "BertModel"): {"feature-extraction"},
    ("llama", "LlamaForCausalLM"): {"text-generation", "feature-extraction"},
    ("t5", "T5ForConditionalGeneration"): {"text2text-generation", "feature-extraction"},
    ("t5", "T5EncoderModel"): {"feature-extraction"},
    ("vit", "ViTForImageClassification"): {"image-classification", "feature-extraction"},
    ("whisper", "WhisperForConditionalGeneration"): {"automatic-speech-recognition", "feature-extraction"},
}


def facts_of(folder, task):
    location = locate(ModelSpec(id=str(folder), task=task))
    checkpoint = Checkpoint(location.folder)
    facts = outline(location, checkpoint)
    check_task(location, checkpoint)
    return facts


@pytest.mark.parametrize(("family", "architecture"), FITTING)
def test_a_head_that_the_weights_lack_is_refused(tmp_path, family, architecture):
    folder = save_head(family, architecture, tmp_path / "model")
    fitting = FITTING[family, architecture]
    for task in TASKS:
        if task in fitting:
            assert facts_of(folder, task).architecture
            continue
        with pytest.raises(UsageError) as caught:
            facts_of(folder, task)
        assert caught.value.where
        assert caught.value.hint
        assert not set(TASKS) & set(caught.value.hint.replace(",", "").split()) - fitting


def test_the_refusal_names_the_tasks_that_fit(tmp_path):
    folder = save_head("bert", "BertForMaskedLM", tmp_path / "model")
    with pytest.raises(UsageError, match="cannot do question-answering") as caught:
        facts_of(folder, "question-answering")
    assert caught.value.hint == "its weights fit: --task feature-extraction, fill-mask"


def test_the_class_of_a_task_is_written_into_the_config(tmp_path):
    folder = save_head("bert", "BertForMaskedLM", tmp_path / "model")
    assert facts_of(folder, None).architecture == "BertForMaskedLM"
    facts = facts_of(folder, "feature-extraction")
    assert (facts.architecture, facts.config["architectures"]) == ("BertModel", ["BertModel"])


def test_a_class_that_config_names_stays_when_it_does_the_task(tmp_path):
    folder = save_head("t5", "T5EncoderModel", tmp_path / "model")
    assert facts_of(folder, "feature-extraction").architecture == "T5EncoderModel"


def test_a_causal_model_has_no_pooling(tmp_path):
    folder = save_head("llama", "LlamaForCausalLM", tmp_path / "model")
    assert facts_of(folder, "feature-extraction").is_causal_lm is False
    with pytest.raises(UsageError, match=r".") as caught:
        facts_of(folder, "sentence-similarity")
    assert "modules.json" in caught.value.where


def test_a_sentence_folder_with_the_head_it_was_trained_with(tmp_path):
    folder = save_sentence_folder(tmp_path / "model", architecture="BertForMaskedLM")
    assert facts_of(folder, None).architecture == "BertModel"
    assert facts_of(folder, "fill-mask").architecture == "BertForMaskedLM"
