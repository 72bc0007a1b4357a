"""The list of what a run reads, by what it is read for."""

from __future__ import annotations

import json
import shutil

import pytest
from families import save_family, save_sentence_folder
from helpers import recipe
from llmopt.core.errors import UsageError
from llmopt.core.recipe import EvaluationSpec, ModelSpec
from llmopt.pipeline.output import check_output
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.reads import files_read, paths_of, steady
from llmopt.pipeline.steps import passes_of
from msgspec.structs import replace
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


def read(made, role):
    return {one.name for one in files_read(made, passes_of(made)) if one.role == role}


def test_a_model_is_its_weights_and_what_lies_beside_them(tmp_path):
    folder = save_family("llama", tmp_path / "m", shard="60KB")
    for name in ("notes.md", "code.py", "llmopt.json", "llmopt.run.json", "genai_config.json"):
        (folder / name).write_text("{}")
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert len(shards) > 1
    beside = {"config.json", "generation_config.json", "model.safetensors.index.json", *TOKENIZER}
    assert read(recipe(folder), "model") == shards | beside
    trusted = replace(recipe(folder), model=ModelSpec(id=str(folder), trust_remote_code=True))
    assert read(trusted, "model") == shards | beside | {"code.py"}


def test_a_sentence_folder_is_read_with_its_modules(tmp_path):
    folder = save_sentence_folder(tmp_path / "m", dense=16)
    names = read(recipe(folder), "model")
    assert {"modules.json", "1_Pooling/config.json"} <= names
    assert any(name.endswith("Dense/model.safetensors") for name in names)


def test_texts_teachers_and_adapters(family, text, tmp_path):
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (tmp_path / "adapter" / name).write_text("")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    learn = {"teacher": str(family("llama", hidden_size=32)), "data": f"hf:{tmp_path / 'set'}:train"}
    passes = [("merge-adapter", {"adapters": [str(tmp_path / "adapter")]}), ("distill", learn)]
    made = recipe(family("llama"), *passes, data=text)
    made = replace(made, gates=("perplexity<=9",), evaluation=(EvaluationSpec(data=str(text)),))
    assert read(made, "adapter") == {"adapter_config.json", "adapter_model.safetensors"}
    assert {"config.json", "model.safetensors", *TOKENIZER} <= read(made, "teacher")
    assert read(made, "text") == {"train.jsonl"}
    assert read(made, "calibration") == read(made, "evaluation") == {text.name}
    files = files_read(made, passes_of(made))
    assert paths_of(files).count(text) == 1
    assert all(path.is_file() for path in paths_of(files))


def test_a_data_set_of_the_hub_is_no_file(family):
    made = recipe(family("llama"), ("distill", {"data": "hf:org/name:train", "teacher": str(family("llama"))}))
    assert read(made, "text") == set()


def test_the_recipe_is_read_once_and_may_change(family, tmp_path):
    (tmp_path / "r.yaml").write_text("")
    plan = make_plan(recipe(family("llama")), written_in=tmp_path / "r.yaml")
    assert tmp_path / "r.yaml" in paths_of(plan.reads)
    assert tmp_path / "r.yaml" not in paths_of(steady(plan.reads))


@pytest.mark.parametrize("what", ["model", "text", "a link", "adapter"])
def test_an_output_that_holds_what_is_read_is_refused(family, text, tmp_path, what):
    place = tmp_path / "out"
    place.mkdir()
    (place / "llmopt.json").write_text("{}")
    made = recipe(family("llama"))
    if what == "model":
        made = recipe(shutil.copytree(family("llama"), place / "model"))
    elif what == "adapter":
        config = LoraConfig(r=2)
        get_peft_model(AutoModelForCausalLM.from_pretrained(family("llama")), config).save_pretrained(place / "lora")
        made = recipe(family("llama"), ("merge-adapter", {"adapters": [str(place / "lora")]}))
    else:
        (place / "text.txt").symlink_to(text) if what == "a link" else shutil.copyfile(text, place / "text.txt")
        made = recipe(family("llama"), ("gptq", {"group_size": 32}), data=place / "text.txt")
    with pytest.raises(UsageError, match="holds what is read"):
        check_output(place, force=True, inputs=paths_of(make_plan(made).reads))
