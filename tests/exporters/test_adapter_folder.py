"""The folder of an adapter: what is in it is what was written, and nothing else."""

import json

import pytest
import torch
from llmopt.core.adapter import Adapter, names, peft_config
from llmopt.core.errors import LlmoptError
from llmopt.exporters import adapter_folder
from llmopt.exporters.adapter_folder import same_adapter, write_adapter
from safetensors.torch import save_file

LAYER = "model.layers.0.mlp.down_proj"


def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 24), (16, 4)
    return {name: torch.randn(*shape, generator=generator) for name, shape in zip(names(LAYER), shapes, strict=True)}


CONFIG = peft_config([LAYER], rank=4, alpha=8, transposed=False, base=None)


def test_it_is_what_was_written(tmp_path):
    write_adapter(tmp_path, tensors(), CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert same_adapter(tmp_path, tensors(), CONFIG)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [LAYER]


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held.update({names(LAYER)[0]: held[names(LAYER)[0]].nextafter(torch.tensor(9.0))}),
        lambda held: held.update({names(LAYER)[0]: held[names(LAYER)[0]].double()}),
        lambda held: held.update({names("model.layers.1.mlp.down_proj")[0]: torch.zeros(4, 24)}),
        lambda held: held.pop(names(LAYER)[1]),
    ],
    ids=["the last bit", "another dtype", "one more", "one less"],
)
def test_whatever_differs_is_seen(tmp_path, change):
    write_adapter(tmp_path, tensors(), CONFIG)
    held = tensors()
    change(held)
    save_file(held, tmp_path / "adapter_model.safetensors")
    assert not same_adapter(tmp_path, tensors(), CONFIG)


def test_another_scale_is_seen(tmp_path):
    write_adapter(tmp_path, tensors(), CONFIG)
    assert not same_adapter(tmp_path, tensors(), {**CONFIG, "lora_alpha": 4})


def test_what_was_not_written_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_folder, "same_adapter", lambda *_: False)
    with pytest.raises(LlmoptError, match="does not hold what was written"):
        write_adapter(tmp_path, tensors(), CONFIG)


def test_the_scale_is_alpha_over_rank():
    adapter = Adapter(file="", layers=(LAYER,), rank=4, alpha=6, transposed=False)
    assert adapter.scale == 1.5
    assert (adapter.config()["r"], adapter.config()["lora_alpha"]) == (4, 6)
