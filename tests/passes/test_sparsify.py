"""Zeros in whole models: as many as asked for, where asked for, and still there after rounding."""

import pytest
import torch
from families import FAMILIES, random_rows
from helpers import build, open_model, recipe
from llmopt.core.errors import UsageError
from llmopt.core.passes import PassContext
from llmopt.passes import PASSES
from llmopt.passes.numerics.sparsity import Pattern, holds
from llmopt.passes.rtn import Rtn, RtnParams
from llmopt.passes.sparsify import Sparsify, SparsifyParams
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.sweep import run_sweep
from safetensors.torch import load_file

TEXTS = [name for name, one in FAMILIES.items() if one.text]
TWO_OF_FOUR = Pattern(2, 4)


def swept(folder, work, *passes, rows=None):
    model = open_model(folder, work)
    return model, run_sweep(model, passes, random_rows() if rows is None else rows, PassContext())


def logical(model, name):
    """Return a layer's weight as (out, in), also one of experts in one tensor."""
    linear = next(one for one in model.facts.linears if one.name == name)
    weight = model.read(f"{name}.weight")
    return weight.T if linear.transposed else weight


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_group_of_four_has_two_zeros(name, method, family, tmp_path):
    one = Sparsify(SparsifyParams(method=method, pattern="2:4"))
    model, (result,) = swept(family(name), tmp_path, one, rows=random_rows(16, 32))
    layers = [linear.name for linear in model.facts.linears]
    assert set(result.changed) >= set(layers)
    for layer in layers:
        assert holds(logical(model, layer), TWO_OF_FOUR), layer
    assert result.metrics["left_in_group_max_count"] == 2
    assert result.metrics["zero_weights_count"] >= result.metrics["weights_count"] / 2


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("share", ["25%", "60%"])
def test_as_many_weights_go_as_asked_for(method, share, family, tmp_path):
    one = Sparsify(SparsifyParams(method=method, sparsity=share))
    _, (result,) = swept(family("llama"), tmp_path, one)
    zeros = result.metrics["zero_weights_count"] / result.metrics["weights_count"]
    assert zeros == pytest.approx(float(share[:-1]) / 100, abs=0.01)


QUANTIZERS = [
    *(
        (name, {"bits": bits, "group_size": 32, "symmetric": symmetric})
        for name in ("rtn", "hqq", "awq", "gptq", "autoround")
        for bits, symmetric in ((4, True), (4, False), (2, False))
    ),
    ("gptq", {"number": "mxfp4"}),
    ("rtn", {"number": "nvfp4", "overrides": ()}),
]


@pytest.mark.parametrize(("name", "params"), QUANTIZERS)
@pytest.mark.parametrize("together", [True, False])
def test_zeros_are_still_zeros_after_rounding(name, params, together, family, tmp_path):
    from llmopt.core.params import convert

    kind = PASSES.load(name)
    if name == "autoround":
        params = {**params, "iterations": 5}
    quantizer = kind(convert(params, kind.Params, where="test"))
    sparsify = Sparsify(SparsifyParams(pattern="2:4"))
    folder = family("llama", hidden_size=128, intermediate_size=128, head_dim=32)
    model = open_model(folder, tmp_path)
    rows = random_rows()
    if together:
        run_sweep(model, [sparsify, quantizer], rows, PassContext())
    else:
        run_sweep(model, [sparsify], rows, PassContext())
        run_sweep(model, [quantizer], rows, PassContext())
    assert len(model.quantized) == 14
    for layer in model.quantized:
        assert holds(logical(model, layer), TWO_OF_FOUR), layer


def test_zeros_stay_when_scales_move(family, tmp_path):
    steps = [("sparsify", {"method": "magnitude"}), ("smooth", {}), ("awq", {"scales_only": True, "group_size": 32})]
    folder = family("llama")
    model = open_model(folder, tmp_path / "work")
    from llmopt.core.params import convert

    made = [PASSES.load(name)(convert(params, PASSES.load(name).Params, where="test")) for name, params in steps]
    gptq = PASSES.load("gptq")(convert({"group_size": 32}, PASSES.load("gptq").Params, where="test"))
    run_sweep(model, [*made, gptq], random_rows(), PassContext())
    zeros = sum(int((model.read(f"{name}.weight") == 0).sum()) for name in model.quantized)
    total = sum(model.read(f"{name}.weight").numel() for name in model.quantized)
    assert zeros >= total / 2


def test_a_run_writes_the_zeros(family, text, tmp_path):
    made = recipe(family("llama"), ("sparsify", {"pattern": "2:4"}), ("gptq", {"group_size": 32}), data=text)
    assert make_plan(made).steps[0].title == "sparsify + gptq"
    manifest = build(made, tmp_path / "out")
    assert manifest.exports[0].verification.passed
    plain = recipe(family("llama"), ("sparsify", {"pattern": "4:8"}), data=text)
    build(plain, tmp_path / "plain")
    tensors = load_file(next((tmp_path / "plain").glob("*.safetensors")))
    assert holds(tensors["model.layers.1.mlp.down_proj.weight"], Pattern(4, 8))
    assert not holds(tensors["model.layers.1.mlp.down_proj.weight"], TWO_OF_FOUR)
    assert tensors["lm_head.weight"].count_nonzero() == tensors["lm_head.weight"].numel()


def test_later_blocks_see_what_sparse_ones_make(family, tmp_path):
    """The second block's Hessian is that of the sparse first one: with a dense first block other weights go."""
    masks = []
    for ignore in ((), ("model.layers.0.*",)):
        one = Sparsify(SparsifyParams(ignore=ignore))
        model, _ = swept(family("llama"), tmp_path / str(len(ignore)), one)
        masks.append(model.read("model.layers.1.mlp.down_proj.weight") != 0)
    assert not masks[0].equal(masks[1])


def test_it_loses_less_with_data(family, tmp_path):
    folder, rows = family("llama"), random_rows(24, 32)
    inputs = {"input_ids": torch.tensor(random_rows(8, 32, seed=4))}
    with torch.no_grad():
        expected = open_model(folder, tmp_path / "dense").materialize()(**inputs).logits
        errors = {}
        for method in ("magnitude", "wanda", "sparsegpt"):
            model, _ = swept(folder, tmp_path / method, Sparsify(SparsifyParams(method=method)), rows=rows)
            errors[method] = float((model.materialize()(**inputs).logits - expected).square().mean())
    assert errors["sparsegpt"] < errors["magnitude"]


def test_ignored_layers_stay_dense(family, tmp_path):
    one = Sparsify(SparsifyParams(method="magnitude", ignore=("*.down_proj",)))
    model, (result,) = swept(family("llama"), tmp_path, one)
    assert model.read("model.layers.0.mlp.down_proj.weight").all()
    assert [skip.reason for skip in result.skipped] == ["ignored by `*.down_proj`"] * 2


def test_a_layer_that_groups_do_not_tile_is_left_with_a_reason(family, tmp_path):
    one = Sparsify(SparsifyParams(method="magnitude", pattern="4:8"))
    model, (result,) = swept(family("llama", intermediate_size=100), tmp_path, one)
    skipped = {skip.name: skip.reason for skip in result.skipped}
    assert skipped["model.layers.0.mlp.down_proj"] == "its 100 input features are not a multiple of 8"
    assert model.read("model.layers.0.mlp.down_proj.weight").all()


def test_an_expert_that_few_tokens_reach_is_told(family, tmp_path):
    one = Sparsify(SparsifyParams())
    _, (result,) = swept(family("mixtral"), tmp_path, one, rows=[[5] * 8])
    assert any("no calibration token reaches it; its smallest weights went" in note for note in result.notes)
    assert result.metrics["zero_weights_count"] == result.metrics["weights_count"] / 2


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"sparsity": "100%"}, "cannot read the share `100%`"),
        ({"sparsity": "0.5"}, "cannot read the share `0.5`"),
        ({"pattern": "2:4", "sparsity": "60%"}, "2:4 has a sparsity of its own"),
        ({"ignore": ["*.nonsense"]}, "`*.nonsense` matches no layer"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(params, message, family, text):
    with pytest.raises(UsageError) as caught:
        make_plan(recipe(family("llama"), ("sparsify", params), data=text))
    assert message in caught.value.what
    assert caught.value.hint


@pytest.mark.parametrize(
    ("first", "then"),
    [("rtn", "sparsify"), ("sparsify", "rotate"), ("sparsify", "prune-width"), ("sparsify", "prune-depth")],
)
def test_orders_that_would_lose_zeros_are_refused(first, then, family, text):
    params = {"rtn": {"group_size": 32}, "prune-width": {"mlp": "30%"}, "prune-depth": {"drop": 1}}
    steps = [(name, params.get(name, {})) for name in (first, then)]
    with pytest.raises(UsageError, match=f"`{then}` cannot come after `{first}`"):
        make_plan(recipe(family("llama"), *steps, data=text))


def test_magnitude_needs_no_data(family):
    make_plan(recipe(family("llama"), ("sparsify", {"method": "magnitude"})))
    with pytest.raises(UsageError, match="`sparsify` needs calibration data"):
        make_plan(recipe(family("llama"), ("sparsify", {})))


def test_dense_models_are_rounded_as_before(family, tmp_path):
    """No mask where nothing was made sparse."""
    model, _ = swept(family("llama"), tmp_path, Rtn(RtnParams(group_size=32)))
    assert not model.store.sparse
