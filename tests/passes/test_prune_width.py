"""Narrower layers: which axes they are, what is chosen, and that the cut changes nothing that was not zero."""

import json

import pytest
import torch
import transformers
from families import FAMILIES, Family, random_rows, save_family
from helpers import assert_near, build, open_model, recipe
from llmopt.core.errors import UsageError
from llmopt.core.passes import PassContext
from llmopt.core.plan import Limits
from llmopt.models.reference import streamed_outputs
from llmopt.models.text import proof_batches
from llmopt.passes.numerics.narrowing import Energy, columns_of_units, refit, scores_of_units
from llmopt.passes.prune_width import PruneWidth, PruneWidthParams
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.sweep import run_sweep
from llmopt.pipeline.transforming import run_survey

TEXTS = [name for name, one in FAMILIES.items() if one.text]
BASE = {key: value for key, value in FAMILIES["llama"].config.items() if key != "model_type"}
OTHERS = {
    "gpt_oss": Family(
        "GPT-OSS",
        "GptOssForCausalLM",
        {"model_type": "gpt_oss", **BASE, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "qwen2_moe": Family(
        "Qwen2-MoE",
        "Qwen2MoeForCausalLM",
        {"model_type": "qwen2_moe", **BASE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 48},
    ),
    "olmo2": Family("OLMo 2", "Olmo2ForCausalLM", {"model_type": "olmo2", **BASE}),
}
"""Experts in one tensor with gate and up interleaved, a shared expert, norms as wide as all heads."""

HEADS = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3", "mixtral", "qwen3_moe")
HIDDEN = ("llama", "qwen2", "qwen3", "mistral", "phi3", "mixtral", "qwen3_moe")
REFUSED = {
    ("gpt2", "heads"): "no weight follows n_head",
    ("gpt2", "hidden"): "`transformer.h.0.attn.scaling` follows `n_embd`",
    ("gpt_neox", "heads"): "no weight follows num_attention_heads",
    ("bert", "hidden"): "follows `hidden_size`, and weights are scaled by it",
    ("gemma2", "hidden"): "`model.embed_tokens.scalar_embed_scale` follows `hidden_size`",
    ("t5", "heads"): "with units in another order it does not answer as before",
    ("opt", "hidden"): "makes a model of other parameters",
}


@pytest.fixture
def folder(family, monkeypatch, tmp_path):
    """Return the folder of a tiny model of any family that is named here."""

    def of(name, **changes):
        if name not in OTHERS:
            return family(name, **changes)
        monkeypatch.setitem(FAMILIES, name, OTHERS[name])
        return save_family(name, tmp_path / f"{name}-source", **changes)

    return of


def pruned(model, rows, **params):
    """Return the model whose columns are zero, and the one from which they are cut."""
    return run_survey(model, PruneWidth(PruneWidthParams(**params)), PassContext(rows=rows), Limits())


def answers(model, seed=3):
    return streamed_outputs(model.skeleton(), model.read, proof_batches(model.skeleton(), seed))


@pytest.mark.parametrize("name", [*TEXTS, *OTHERS])
@pytest.mark.parametrize("refitted", [True, False])
def test_neurons_are_cut_where_nothing_reads_them(name, refitted, folder, tmp_path):
    model = open_model(folder(name), tmp_path / "work")
    narrower, result = pruned(model, random_rows(8, 32), mlp="30%", refit=refitted)
    assert result.metrics["parameters_after_count"] < result.metrics["parameters_before_count"]
    assert narrower.facts.parameters == result.metrics["parameters_after_count"]
    narrower.skeleton()
    for expected, got in zip(answers(model), answers(narrower), strict=True):
        assert_near(got, expected)


@pytest.mark.parametrize("name", [*HEADS, "gpt_oss", "olmo2"])
def test_heads_go_with_all_queries_that_share_them(name, folder, tmp_path):
    source = folder(name)
    model = open_model(source, tmp_path / "work")
    if name == "olmo2":  # its norm runs over all heads, so fewer of them are another norm
        narrower, _ = pruned(model, random_rows(8, 32), heads=1)
        assert narrower.facts.config["num_key_value_heads"] == 1
        return
    narrower, _ = pruned(model, random_rows(8, 32), heads="50%")
    config = narrower.facts.config
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 16)
    for expected, got in zip(answers(model), answers(narrower), strict=True):
        assert_near(got, expected)


@pytest.mark.parametrize("name", HIDDEN)
def test_the_stream_loses_the_same_channels_everywhere(name, family, tmp_path):
    """Where the channels that go are zero in whatever writes them, the rest is as before but for the norms' mean."""
    model = open_model(family(name), tmp_path / "work")
    gone = torch.tensor([1, 5, 8, 20, 33, 40, 41, 62])
    kept = [channel for channel in range(64) if channel not in gone.tolist()]
    changed = {}
    found = model.channels(["hidden"], seed=0)
    for key in model.tensor_specs():
        tensor = model.read(key)
        for cut in found._cuts.get(key, ()):
            if key.endswith(("o_proj.weight", "down_proj.weight", "w2.weight", "embed_tokens.weight")):
                tensor.index_fill_(cut.axis, gone, 0)
                changed[key] = tensor
            elif "norm" in key and tensor.ndim == 1 and tensor.shape[0] == 64:
                changed[key] = tensor * (56 / 64) ** 0.5  # the mean is now over fewer channels
    model.store.put("zeroed", {}, changed={key: value.contiguous() for key, value in changed.items()})
    (one,) = found.sets
    narrower = found.kept(model, {one.name: kept})
    restored = {
        key: narrower.read(key) / (56 / 64) ** 0.5
        for key, (_, shape) in narrower.tensor_specs().items()
        if "norm" in key and shape == (56,)
    }
    plain = {key: value / (56 / 64) ** 0.5 for key, value in changed.items() if "norm" in key}
    narrower.store.put("restored", {}, changed=restored)
    model.store.put("plain", {}, changed=plain)
    # x / sqrt(mean over 56) is x / sqrt(mean over 64) times sqrt(56/64): the norms of the wide model make up for it.
    scaled = {key: value * (56 / 64) ** 0.5 for key, value in plain.items()}
    model.store.put("scaled", {}, changed=scaled)
    for expected, got in zip(answers(model), answers(narrower), strict=True):
        assert_near(got, expected, factor=20)


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_what_cannot_be_pruned_is_refused_with_the_reason(name, kind, family, tmp_path):
    with pytest.raises(UsageError) as caught:
        open_model(family(name), tmp_path).channels([kind], seed=0)
    assert REFUSED[name, kind] in caught.value.where
    assert caught.value.hint == f"leave `{kind}` out"


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "bert", "t5", "mixtral"])
def test_a_run_writes_a_model_that_transformers_opens(name, family, text, tmp_path):
    params = {"mlp": "30%"} | ({"heads": 1, "hidden": "25%"} if name in HIDDEN else {})
    manifest = build(recipe(family(name), ("prune-width", params), data=text), tmp_path / "out")
    assert manifest.exports[0].verification.passed
    loaded = getattr(transformers, FAMILIES[name].architecture).from_pretrained(tmp_path / "out")
    size = sum(parameter.numel() for parameter in loaded.parameters())
    assert size == manifest.passes[0].metrics["parameters_after_count"]
    if name == "qwen2":  # the embeddings are the head
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert loaded.lm_head.weight.shape == (272, 48)


def test_pruning_depth_and_width_and_rounding_compose(family, text, tmp_path):
    steps = [("prune-depth", {"drop": 1}), ("prune-width", {"mlp": "33%"}), ("gptq", {"group_size": 32})]
    manifest = build(recipe(family("llama", num_hidden_layers=3), *steps, data=text), tmp_path / "out")
    assert manifest.exports[0].verification.passed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 64)


def test_neurons_that_do_nothing_go_first(family, tmp_path):
    model = open_model(family("llama"), tmp_path / "work")
    idle = torch.arange(0, 96, 3)
    name = "model.layers.0.mlp.up_proj.weight"
    up = model.read(name)
    up[idle] = 0
    model.store.put("idle", {}, changed={name: up})
    before = answers(model)
    narrower, result = pruned(model, random_rows(8, 32), mlp=32)
    kept = narrower.read(name)
    assert kept.equal(up[[row for row in range(96) if row % 3]])
    assert result.metrics["mlp_importance_lost_max_ratio"] > 0  # of the other block
    assert not torch.allclose(before[0]["logits"], answers(narrower)[0]["logits"], atol=1e-4)


def test_fitting_loses_less_of_the_output(family, tmp_path):
    rows = random_rows(32, 32)
    errors = []
    for refitted in (True, False):
        model = open_model(family("llama"), tmp_path / str(refitted))
        expected = answers(model)[0]["logits"]
        narrower, _ = pruned(model, rows, mlp="50%", refit=refitted)
        errors.append(float((answers(narrower)[0]["logits"] - expected).square().mean()))
    assert errors[0] < errors[1]


def test_experts_choose_each_for_itself_and_stay_equally_wide(family, tmp_path):
    model = open_model(family("mixtral"), tmp_path / "work")
    one = PruneWidth(PruneWidthParams(mlp="33%"))
    context = PassContext(rows=random_rows(8, 32))
    one.begin(model, context)
    run_sweep(model, [one], context.rows, context)
    choices = {name: tuple(kept) for name, kept in one._kept.items()}
    assert len(choices) == 8
    assert len(set(choices.values())) > 1
    narrower, _ = one.conclude(model, context)
    for name, (_, shape) in narrower.tensor_specs().items():
        if ".experts." in name:
            assert 64 in shape
            assert 96 not in shape


def test_an_expert_that_no_token_reaches_is_judged_by_its_weights(family, tmp_path):
    model = open_model(family("mixtral"), tmp_path / "work")
    router = model.read("model.layers.0.block_sparse_moe.gate.weight")
    router[3] = 0
    router[:3] *= 100
    model.store.put("router", {}, changed={"model.layers.0.block_sparse_moe.gate.weight": router})
    _, result = pruned(model, [[5] * 8], mlp="33%")
    assert any("no calibration token reaches it; chosen by its weights" in note for note in result.notes)


def test_refit_is_least_squares():
    torch.manual_seed(0)
    rows = torch.randn(400, 12) @ torch.randn(12, 12)
    weight, kept = torch.randn(5, 12), torch.tensor([0, 2, 3, 7, 8, 11])
    hessian = rows.T @ rows / len(rows)
    made = refit(weight, hessian, kept)
    assert made[:, [1, 4, 5, 6, 9, 10]].eq(0).all()
    best = torch.linalg.lstsq(rows[:, kept].double(), (rows @ weight.T).double()).solution.T.float()

    def error(one):
        return float((rows @ (one - weight).T).square().mean())

    exact = torch.zeros_like(weight)
    exact[:, kept] = best
    plain = torch.zeros_like(weight)
    plain[:, kept] = weight[:, kept]
    assert error(exact) <= error(made) <= 1.2 * error(exact) + 1e-6
    assert error(made) < error(plain)


def test_refit_without_data_leaves_the_weights():
    weight = torch.randn(3, 8)
    made = refit(weight, torch.zeros(8, 8), torch.tensor([1, 2]))
    assert made[:, [1, 2]].equal(weight[:, [1, 2]])
    assert made.count_nonzero() == 6


def test_units_lie_part_after_part():
    assert columns_of_units(torch.tensor([0, 2]), (2, 1), 3).tolist() == [0, 1, 4, 5, 6, 8]
    scores = scores_of_units(torch.arange(9.0), (2, 1), 3)
    assert scores.tolist() == [0 + 1 + 6, 2 + 3 + 7, 4 + 5 + 8]
    energy = Energy(2)
    energy.add(torch.tensor([[1.0, 2.0]]))
    energy.add(torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    assert energy.mean.tolist() == pytest.approx([10 / 3, 4 / 3])


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("llama", {}, "nothing to prune"),
        ("llama", {"mlp": "100%"}, "cannot read the share `100%`"),
        ("llama", {"mlp": 96}, "`96` of 96 leaves nothing"),
        ("llama", {"mlp": "2%"}, "`mlp: 2%` takes nothing away"),
        ("llama", {"heads": 2}, "`2` of 2 leaves nothing"),
        ("llama", {"heads": "10%"}, "`10%` of 2 leaves everything as it is"),
        ("llama", {"hidden": "half"}, "cannot read the share `half`"),
        ("t5", {"hidden": "25%"}, "the hidden size of T5ForConditionalGeneration cannot be pruned"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(name, params, message, family, text):
    with pytest.raises(UsageError) as caught:
        make_plan(recipe(family(name), ("prune-width", params), data=text))
    assert message in caught.value.what
    assert caught.value.hint


def test_it_needs_calibration_data(family):
    with pytest.raises(UsageError, match="`prune-width` needs calibration data"):
        make_plan(recipe(family("llama"), ("prune-width", {"mlp": "30%"})))


@pytest.mark.parametrize(
    "params", [{"mlp": "30%"}, {"heads": 1}, {"hidden": "25%"}, {"mlp": 32, "heads": 1, "hidden": 16}]
)
def test_the_plan_knows_the_size(params, family, text, tmp_path):
    made = recipe(family("qwen3"), ("prune-width", params), data=text)
    plan = make_plan(made)
    manifest = build(made, tmp_path / "out")
    written = sum(file.bytes for name, file in manifest.exports[0].files.items() if name.endswith(".safetensors"))
    assert plan.output_bytes == pytest.approx(written, rel=0.03)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_floats_and_a_rotation_before(dtype, family, text, tmp_path):
    folder = family("qwen2", dtype=dtype)
    steps = [("rotate", {}), ("prune-width", {"mlp": "30%", "heads": 1, "hidden": "25%"}), ("rtn", {"group_size": 16})]
    manifest = build(recipe(folder, *steps, data=text), tmp_path / "out")
    assert manifest.exports[0].verification.passed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_size"], config["num_key_value_heads"], config["dtype"]) == (48, 1, dtype)


def test_a_number_of_heads_that_config_json_cannot_hold_is_refused_before_the_sweep(family, text, tmp_path):
    """transformers wants the hidden size to be a multiple of the heads, though each head has a size of its own."""
    folder = family("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    with pytest.raises(UsageError) as caught:
        build(recipe(folder, ("prune-width", {"heads": 1}), data=text), tmp_path / "out")
    assert "num_attention_heads cannot be 6" in caught.value.where
    assert "multiple" in caught.value.where
    manifest = build(recipe(folder, ("prune-width", {"heads": 2}), data=text), tmp_path / "out")
    assert manifest.exports[0].verification.passed
