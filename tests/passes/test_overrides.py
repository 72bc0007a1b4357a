"""Other grids for some layers: which override holds, what is refused, and whole runs in mixed bits."""

import msgspec
import pytest
import torch
from helpers import build, open_model, recipe
from llmopt.core.errors import UsageError
from llmopt.core.params import convert
from llmopt.core.passes import PassContext
from llmopt.core.quantized import Grid
from llmopt.core.target import Target
from llmopt.passes import PASSES
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.sweep import run_sweep

METHODS = [name for name in PASSES if "overrides" in PASSES.load(name).Params.__struct_fields__]


def make(name, *overrides, **params):
    made = PASSES.load(name)
    return made(convert({"group_size": 32, "overrides": list(overrides), **params}, made.Params, where="test"))


def test_the_first_override_that_matches_holds():
    one = make(
        "rtn",
        {"pattern": "*.0.*", "bits": 8},
        {"pattern": "*.down_proj", "bits": 3, "group_size": "channel"},
        {"pattern": "re:.*up_proj", "symmetric": False},
    )
    assert one.grid_for("model.0.down_proj") == Grid(bits=8, group_size=32, symmetric=True)
    assert one.grid_for("model.1.down_proj") == Grid(bits=3, group_size="channel", symmetric=True)
    assert one.grid_for("model.1.up_proj") == Grid(bits=4, group_size=32, symmetric=False)
    assert one.grid_for("model.1.q_proj") == Grid(bits=4, group_size=32, symmetric=True) == one.grid()


def test_an_override_goes_before_allocated_bits():
    one = make("rtn", {"pattern": "*.down_proj", "bits": 8}, {"pattern": "*.up_proj", "group_size": 64})
    allocation = {"x.down_proj": 2, "x.up_proj": 3, "x.q_proj": 5}
    assert [one.grid_for(name, allocation).bits for name in allocation] == [8, 3, 5]
    assert one.grid_for("x.up_proj", allocation).group_size == 64


def test_layers_are_left_alone_by_either_way():
    one = make("rtn", {"pattern": "*.down_proj", "ignore": True}, ignore=("*.up_proj",))
    assert one.grid_for("x.down_proj") is None
    assert one.left_alone("x.down_proj") == "ignored by the override `*.down_proj`"
    assert one.left_alone("x.up_proj") == "ignored by `*.up_proj`"
    assert one.left_alone("x.q_proj") is None


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ({"pattern": "*.down_prj", "bits": 8}, "pattern `*.down_prj` matches no layer", "did you mean `down_proj`?"),
        ({"pattern": "re:(", "bits": 8}, "`re:(` is not a regular expression", ""),
        ({"pattern": "*.down_proj"}, "the override `*.down_proj` changes nothing", "say what is different there"),
        (
            {"pattern": "*.layers.1.*", "group_size": 48},
            "cannot group `model.layers.1.mlp.gate_proj`",
            "give the override a group_size that divides 64, or `channel`",
        ),
    ],
)
def test_refusals(override, message, hint, family, tmp_path):
    facts = open_model(family("llama"), tmp_path).facts
    with pytest.raises(UsageError) as caught:
        make("rtn", override).check(facts, Target.CPU)
    assert caught.value.what == message
    assert (caught.value.hint or "").startswith(hint)


@pytest.mark.parametrize("name", METHODS)
def test_every_weight_pass_heeds_overrides_and_allocated_bits(name, family, tmp_path):
    from families import random_rows

    model = open_model(family("llama"), tmp_path)
    few = {"iterations": 2} if name == "autoround" else {}
    one = make(
        name,
        {"pattern": "*.down_proj", "bits": 8, "group_size": 16, "symmetric": False},
        {"pattern": "*.0.*.k_proj", "ignore": True},
        **few,
    )
    allocation = {linear.name: 3 for linear in model.facts.linears if linear.name.endswith(("up_proj", "down_proj"))}
    (result,) = run_sweep(model, [one], random_rows(4, 24), PassContext(allocation=allocation))
    for layer, grid in model.quantized.items():
        if layer.endswith("down_proj"):
            assert grid == Grid(bits=8, group_size=16, symmetric=False)
        else:
            assert grid == Grid(bits=3 if layer.endswith("up_proj") else 4, group_size=32, symmetric=True)
        assert model.quantized_weight(layer).grid == grid
    left = [linear.name for linear in model.facts.linears if linear.name not in model.quantized]
    assert [skip.name for skip in result.skipped] == left
    assert left == [name for name in left if ".0." in name and name.endswith("k_proj")] != []


def test_mixed_bits_are_written_read_and_run(family, tmp_path):
    made = recipe(
        family("llama"),
        (
            "rtn",
            {
                "group_size": 32,
                "overrides": [
                    {"pattern": "*.down_proj", "bits": 8},
                    {"pattern": "*.v_proj", "bits": 3},
                    {"pattern": "*.q_proj", "ignore": True},
                ],
            },
        ),
    )
    manifest = build(made, tmp_path / "out")
    parity = manifest.exports[0].verification
    assert parity.passed
    assert parity.weights_equal
    config = msgspec.json.decode((tmp_path / "out" / "config.json").read_bytes())["quantization_config"]
    assert sorted(group["weights"]["num_bits"] for group in config["config_groups"].values()) == [3, 4, 8]


def test_transformers_reads_mixed_bits(family, tmp_path):
    """The stock loader, not ours, against the dequantized weights."""
    from transformers import AutoModelForCausalLM

    step = ("rtn", {"group_size": 32, "overrides": [{"pattern": "*.down_proj", "bits": 8, "group_size": 16}]})
    build(recipe(family("llama"), step), tmp_path / "packed")
    build(recipe(family("llama"), step, export=("safetensors", {"format": "plain"})), tmp_path / "plain")
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="float32") for name in ("packed", "plain")]
    ids = torch.arange(24)[None] + 3
    with torch.no_grad():
        first, second = (one(input_ids=ids).logits for one in models)
    assert torch.allclose(first, second, atol=1e-4)


def test_the_plan_asks_exporters_of_every_grid_and_counts_its_bytes(family):
    step = {"group_size": 32, "overrides": [{"pattern": "*.down_proj", "group_size": "tensor", "symmetric": False}]}
    with pytest.raises(UsageError, match="no asymmetric weights with one scale a tensor"):
        make_plan(recipe(family("llama"), ("rtn", step)))
    sizes = [
        make_plan(recipe(family("llama"), ("rtn", {"group_size": 32, "overrides": overrides}))).output_bytes
        for overrides in ([], [{"pattern": "*.down_proj", "bits": 8}], [{"pattern": "*.down_proj", "ignore": True}])
    ]
    assert sizes[0] < sizes[1] < sizes[2]
