"""Bits under a budget: the solver against trying everything, what is measured, and whole runs."""

from itertools import product

import msgspec
import pytest
import torch
from families import random_rows
from helpers import build, open_model, recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from llmopt.core.errors import UsageError
from llmopt.core.params import convert
from llmopt.core.passes import PassContext
from llmopt.core.target import Target
from llmopt.passes import PASSES
from llmopt.passes.numerics.allocation import Option, allocate
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.steps import sweeps
from llmopt.pipeline.sweep import run_sweep

SIZES = st.floats(1, 100)
PARTS = st.lists(
    st.lists(st.builds(Option, bits=st.just(4), size=SIZES, loss=st.floats(0, 10)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


@given(parts=PARTS, share=st.floats(0.05, 1.2))
@settings(max_examples=60, deadline=None)
def test_no_choice_under_the_budget_loses_less(parts, share):
    budget = share * sum(max(option.size for option in part) for part in parts)
    chosen = allocate(parts, budget)
    fitting = [one for one in product(*parts) if sum(option.size for option in one) <= budget]
    if not fitting:
        assert chosen is None or sum(option.size for option in chosen) <= budget * (1 + 1e-5)
        return
    assert chosen is not None
    assert sum(option.size for option in chosen) <= budget * (1 + 1e-5)
    least = min(sum(option.loss for option in one) for one in fitting)
    assert sum(option.loss for option in chosen) <= least + 1e-4 * max(option.loss for part in parts for option in part)


def make(budget="5bpw", quantizer=("rtn", {"group_size": 32}), **params):
    return _prepared([("allocate-bits", {"budget": budget, **params}), quantizer])


def _prepared(steps):
    passes = []
    for name, params in steps:
        kind = PASSES.load(name)
        passes.append(kind(convert(params, kind.Params, where="test")))
    passes[0].prepare(passes[1:])
    return passes


def surveyed(folder, work, rows=None, **settings):
    """Return the model's outline, the allocation and the result of a survey."""
    one, _ = make(**settings)
    model = open_model(folder, work)
    one.check(model.facts, Target.CPU)
    run_sweep(model, [one], random_rows(8, 32) if rows is None else rows, PassContext())
    assert not model.quantized
    _, result = one.conclude(None, PassContext())
    return model, result


def taken(model, allocation, group=32):
    """Return bits per weight of an allocation, float32 scales included."""
    weights = {linear.name: linear.out_features * linear.in_features for linear in model.facts.linears}
    chosen = {name: weights[name] for name in allocation}
    return sum((bits + 32 / group) * chosen[name] for name, bits in allocation.items()) / sum(chosen.values())


@pytest.mark.parametrize("measure", ["block", "kl"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "phi3"])
def test_the_budget_is_kept_and_used(name, measure, family, tmp_path):
    model, result = surveyed(family(name), tmp_path, measure=measure)
    assert sorted(result.allocation) == sorted(linear.name for linear in model.facts.linears)
    bits = taken(model, result.allocation)
    assert 4.5 < bits <= 5.0 + 1e-6
    assert result.metrics["weight_bits"] == pytest.approx(bits)
    assert not result.changed


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe"])
def test_layers_that_engines_fuse_get_the_same(name, family, tmp_path):
    _, result = surveyed(family(name), tmp_path, quantizer=("gptq", {"group_size": 32}))
    families = {}
    for layer, bits in result.allocation.items():
        block, leaf = ".".join(layer.split(".")[:3]), layer.rpartition(".")[2]
        if ".experts." in layer:
            families.setdefault((block, "experts"), set()).add(bits)
        elif leaf in {"q_proj", "k_proj", "v_proj"}:
            families.setdefault((block, "qkv"), set()).add(bits)
        elif leaf in {"gate_proj", "up_proj"}:
            families.setdefault((block, "gate_up"), set()).add(bits)
    assert all(len(bits) == 1 for bits in families.values())
    assert len(families) == 4


def test_layers_that_lose_nothing_leave_their_bits_to_others(family, tmp_path):
    """Made to lose nothing: down projections of zeros, which also makes gate and up irrelevant."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(family("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("down_proj.weight"):
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for measure in ("block", "kl"):
        _, result = surveyed(folder, tmp_path / measure, measure=measure)
        for name, bits in result.allocation.items():
            assert bits == 2 if ".mlp." in name else bits >= 5, name


def test_overrides_fix_bits_and_ignored_layers_are_not_counted(family, tmp_path):
    overrides = [{"pattern": "*.down_proj", "bits": 8}, {"pattern": "*.o_proj", "ignore": True}]
    one, _ = make(quantizer=("rtn", {"group_size": 32, "overrides": overrides}))
    model, result = surveyed(
        family("llama"), tmp_path, quantizer=("rtn", {"group_size": 32, "overrides": overrides}), budget="6bpw"
    )
    assert {bits for name, bits in result.allocation.items() if name.endswith("down_proj")} == {8}
    assert not [name for name in result.allocation if name.endswith("o_proj")]
    assert taken(model, result.allocation) <= 6 + 1e-6
    assert [grid.bits for grid in one.candidates("x.down_proj")] == [8]
    assert one.candidates("x.o_proj") == ()
    assert one.left_alone("x.o_proj") == "ignored by the override `*.o_proj`"


def test_bytes_and_choices(family, tmp_path):
    model, result = surveyed(family("llama"), tmp_path, budget="40KiB", choices=[2, 4, 8])
    assert set(result.allocation.values()) <= {2, 4, 8}
    assert result.metrics["quantized_bytes"] <= 40 * 1024 * (1 + 1e-6)
    everything, result = surveyed(family("llama"), tmp_path / "all", budget="1GB")
    assert set(result.allocation.values()) == {8}
    assert len(everything.facts.linears) == len(result.allocation) == len(model.facts.linears)


def test_the_survey_has_a_sweep_of_its_own():
    passes = _prepared([("allocate-bits", {"budget": "5bpw"}), ("gptq", {})])
    assert [len(group) for group in sweeps(passes)] == [1, 1]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([("allocate-bits", {"budget": "2.5bpw"}), ("rtn", {"group_size": 32})], "a budget of 2.5bpw is too small"),
        ([("allocate-bits", {"budget": "4.5"}), ("rtn", {"group_size": 32})], "cannot read the budget `4.5`"),
        ([("allocate-bits", {"budget": "0bpw"}), ("rtn", {"group_size": 32})], "cannot read the budget `0bpw`"),
        ([("allocate-bits", {"budget": "5bpw"})], "nothing uses the bits that `allocate-bits` chooses"),
        ([("rtn", {"group_size": 32}), ("allocate-bits", {"budget": "5bpw"})], "`allocate-bits` cannot come after"),
    ],
)
def test_refusals(steps, message, family, text):
    with pytest.raises(UsageError) as caught:
        make_plan(recipe(family("llama"), *steps, data=text))
    assert caught.value.what.startswith(message)
    assert caught.value.hint


def test_a_choice_that_no_format_holds_is_refused_by_name(family, text):
    steps = [("allocate-bits", {"budget": "5bpw"}), ("rtn", {"group_size": "tensor", "symmetric": False})]
    with pytest.raises(UsageError) as caught:
        make_plan(recipe(family("llama"), *steps, data=text))
    assert "may choose int2" in caught.value.where


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_from_recipe_to_artifact(method, family, text, tmp_path):
    steps = [("allocate-bits", {"budget": "5bpw"}), (method, {"group_size": 32})]
    made = recipe(family("llama"), *steps, data=text)
    plan = make_plan(made)
    manifest = build(made, tmp_path / "out")
    record = manifest.passes[0]
    assert record.name == "allocate-bits"
    assert record.allocation
    assert manifest.passes[1].allocation == {}
    config = msgspec.json.decode((tmp_path / "out" / "config.json").read_bytes())["quantization_config"]
    written = {
        name: group["weights"]["num_bits"] for group in config["config_groups"].values() for name in group["targets"]
    }
    assert written == record.allocation
    assert manifest.exports[0].verification.weights_equal
    size = sum(file.bytes for name, file in manifest.exports[0].files.items() if name.endswith(".safetensors"))
    assert size <= plan.output_bytes * 1.2


def test_mixed_bits_lose_less_than_uniform_ones_of_that_size(family, tmp_path):
    """On random weights, where sensitivities differ little: by the logits' error."""
    from llmopt.models.text import batches

    rows = random_rows(16, 48, seed=3)
    errors = []
    (batch,) = batches(random_rows(8, 48, seed=4), decoder=False)
    with torch.no_grad():
        expected = open_model(family("llama"), tmp_path / "float").materialize()(**batch).logits
    for allocated in (True, False):
        model = open_model(family("llama"), tmp_path / str(allocated))
        one, quantizer = make(budget="5bpw")
        context = PassContext()
        if allocated:
            run_sweep(model, [one], rows, context)
            context = PassContext(allocation=one.conclude(None, context)[1].allocation)
        run_sweep(model, [quantizer], [], context)
        with torch.no_grad():
            errors.append(float((model.materialize()(**batch).logits - expected).square().mean()))
    assert errors[0] <= errors[1]
