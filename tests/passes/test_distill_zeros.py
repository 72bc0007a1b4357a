"""Sparse students: what `sparsify` set to zero is zero after learning, and the rest has learnt."""

import pytest
import torch
from helpers import build, recipe
from llmopt.core.errors import LlmoptError, UsageError
from llmopt.passes.training import distillation
from llmopt.pipeline.plan import make_plan
from safetensors.torch import load_file

LEARN = {"steps": 16, "batch_size": 4, "length": 16, "learning_rate": 3e-3, "held_out": 8, "weight_decay": 0.1}
PLAIN = ("safetensors", {"format": "plain"})
TWO_OF_FOUR = ("sparsify", {"pattern": "2:4"})
GRIDS = {
    "": [],
    "gptq": [("gptq", {"bits": 4, "group_size": 32})],
    "asymmetric": [("rtn", {"bits": 3, "group_size": 32, "symmetric": False})],
}


def learn(text, **changes):
    return ("distill", {"data": str(text), **LEARN, **changes})


def layers_of(weights):
    return [name for name, tensor in weights.items() if tensor.ndim == 2 and ("layers." in name or ".h." in name)]


@pytest.mark.parametrize("rounds", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(("name", "dtype"), [("llama", "bfloat16"), ("gpt2", "float32")])
def test_exactly_the_same_zeros_are_zero_afterwards(family, text, tmp_path, name, dtype, rounds):
    base = family(name, dtype=dtype)
    steps = (TWO_OF_FOUR, *rounds)
    build(recipe(base, *steps, export=PLAIN, data=text), tmp_path / "before")
    made = build(recipe(base, *steps, learn(text), export=PLAIN, data=text), tmp_path / "after")
    record = made.passes[-1].metrics
    assert record["held_out_kl_after_nats"] < record["held_out_kl_before_nats"]
    before, after = (load_file(tmp_path / one / "model.safetensors") for one in ("before", "after"))
    layers = layers_of(before)
    assert len(layers) == (14 if name == "llama" else 8)
    for layer in layers:
        assert not torch.equal(before[layer], after[layer]), layer
        assert bool((after[layer][before[layer] == 0] == 0).all()), layer
        if not rounds:
            assert torch.equal(before[layer] == 0, after[layer] == 0), layer
        rows = after[layer].T if name == "gpt2" else after[layer]
        assert int((rows.reshape(len(rows), -1, 4) != 0).sum(-1).max()) == 2, layer


def test_only_layers_that_were_made_sparse_are_held(family, text, tmp_path):
    """A zero elsewhere is a weight like any other."""
    steps = (("sparsify", {"sparsity": "70%", "ignore": ["*.down_proj"]}), learn(text))
    build(recipe(family("llama"), *steps[:1], export=PLAIN, data=text), tmp_path / "before")
    build(recipe(family("llama"), *steps, export=PLAIN, data=text), tmp_path / "after")
    before, after = (load_file(tmp_path / one / "model.safetensors") for one in ("before", "after"))
    for layer in layers_of(before):
        share = 0.0 if "down_proj" in layer else 0.7
        assert float((after[layer] == 0).float().mean()) == pytest.approx(share, abs=0.01), layer


def test_zeros_that_did_not_stay_are_found(family, text, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "keep_zeros", lambda *_: None)
    with pytest.raises(LlmoptError, match="did not stay zeros"):
        build(recipe(family("llama"), TWO_OF_FOUR, learn(text), data=text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_over_a_sparse_model(family, text, tmp_path):
    """Merged they would fill the zeros; beside quantized weights they leave them."""
    with pytest.raises(UsageError, match="would fill the zeros"):
        make_plan(recipe(family("llama"), TWO_OF_FOUR, learn(text, lora_rank=2), data=text))
    steps = (TWO_OF_FOUR, *GRIDS["gptq"])
    build(recipe(family("llama"), *steps, export=PLAIN, data=text), tmp_path / "before")
    learnt = learn(text, lora_rank=2, steps=2)
    build(recipe(family("llama"), *steps, learnt, export=PLAIN, data=text), tmp_path / "after")
    before, after = (load_file(tmp_path / one / "model.safetensors") for one in ("before", "after"))
    assert all(torch.equal(before[name], after[name]) for name in before)
