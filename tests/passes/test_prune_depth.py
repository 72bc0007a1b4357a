"""Fewer blocks: which ones, what config.json says then, and that nothing else changes."""

import itertools
import json
import weakref

import msgspec
import pytest
import torch
from families import FAMILIES, random_rows
from helpers import assert_near, build, open_model, recipe
from llmopt.core.errors import UsageError
from llmopt.core.passes import PassContext
from llmopt.core.plan import Limits
from llmopt.core.target import Target
from llmopt.models import store
from llmopt.models.depth import config_without, leaving_out
from llmopt.models.handle import TorchModel
from llmopt.models.reference import streamed_outputs
from llmopt.models.text import batches, proof_batches
from llmopt.passes.numerics.influence import Influence
from llmopt.passes.prune_depth import PruneDepth, PruneDepthParams
from llmopt.pipeline.plan import make_plan
from llmopt.pipeline.transforming import run_survey
from safetensors.torch import load_file

COUNTS = {"gpt2": "n_layer", "distilbert": "n_layers", "t5": "num_layers", "whisper": "encoder_layers"}
DEEP = {
    "t5": {"num_layers": 3, "num_decoder_layers": 4},
    "whisper": {"encoder_layers": 3, "decoder_layers": 4},
    "gemma3": {"num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
}


def deep(family, name):
    """Return the folder of a model of four blocks."""
    return family(name, **DEEP.get(name, {COUNTS.get(name, "num_hidden_layers"): 4}))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_answers_as_with_those_blocks_left_out(name, family, tmp_path):
    folder = deep(family, name)
    model = open_model(folder, tmp_path / "work")
    stack = model.blocks()[-1]
    dropped = [stack[0], stack[2]]
    shorter = model.without_blocks(dropped, seed=0)
    assert [len(one) for one in shorter.blocks()] == [*(len(one) for one in model.blocks()[:-1]), 2]
    assert shorter.facts.blocks == model.facts.blocks - 2
    if not FAMILIES[name].text:
        return
    skeleton = model.skeleton()
    inputs = proof_batches(skeleton, seed=5)
    with leaving_out(skeleton, dropped):
        expected = streamed_outputs(skeleton, model.read, inputs)
    got = streamed_outputs(shorter.skeleton(), shorter.read, inputs)
    whole = streamed_outputs(model.skeleton(), model.read, inputs)
    for one, other, full in zip(got, expected, whole, strict=True):
        shared = [key for key in other if key in one]
        for key in shared:
            assert_near(one[key], other[key])
        assert any(
            not torch.allclose(one[key], full[key], atol=1e-3) for key in shared if one[key].shape == full[key].shape
        )


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "t5"])
def test_a_run_writes_a_model_that_transformers_opens(name, family, text, tmp_path):
    folder = deep(family, name)
    manifest = build(recipe(folder, ("prune-depth", {"drop": "50%"}), data=text), tmp_path / "out")
    record = manifest.passes[0]
    assert manifest.exports[0].verification.passed
    assert record.metrics["dropped_blocks_count"] == len(record.changed) == (4 if name == "t5" else 2)
    moved = {block: figures["answers_moved_nats"] for block, figures in record.layers.items()}
    assert len(moved) == (7 if name == "t5" else 4)
    kept = [value for block, value in moved.items() if block not in record.changed]
    if name != "t5":
        assert max(moved[one] for one in record.changed) <= min(kept)


def test_influence_is_one_minus_the_mean_cosine():
    torch.manual_seed(0)
    before, after = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8)
    influence = Influence()
    for one, other in zip(before, after, strict=True):
        influence.add(one, other)
    a, b = before.reshape(-1, 8), after.reshape(-1, 8)
    naive = sum(1 - float(x @ y / (x.norm() * y.norm())) for x, y in zip(a, b, strict=True)) / len(a)
    assert influence.mean == pytest.approx(naive, abs=1e-6)
    assert Influence().mean == 0


def measured(folder, work, rows, **params):
    model = open_model(folder, work)
    return run_survey(model, PruneDepth(PruneDepthParams(**params)), PassContext(rows=rows), Limits())


def test_a_block_that_does_nothing_goes_first(family, tmp_path):
    """With nothing written to the stream a block turns no hidden state, and its absence costs no loss."""
    folder = deep(family, "llama")
    for by in ("influence", "answers", "loss"):
        model = open_model(folder, tmp_path / by)
        changed = {
            name: torch.zeros_like(model.read(name))
            for name in model.tensor_specs()
            if name.startswith("model.layers.2.") and ("o_proj" in name or "down_proj" in name)
        }
        model.store.put("zero", {}, changed=changed)
        one = PruneDepth(PruneDepthParams(drop=1, by=by))
        _, result = run_survey(model, one, PassContext(rows=random_rows(4, 16)), Limits())
        assert result.changed == ["model.layers.2"]


def test_no_exchange_of_a_block_lowers_the_loss(family, tmp_path):
    """What the search ends with, against models that are shortened for real."""
    folder, rows = deep(family, "llama"), random_rows(6, 24)
    stack = open_model(folder, tmp_path / "whole").blocks()[0]
    (batch,) = batches(rows, decoder=False)

    def loss(names):
        short = open_model(folder, tmp_path / "-".join(names)).without_blocks(names, seed=0)
        with torch.no_grad():
            logits = short.materialize()(**batch).logits
        return float(
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
        )

    losses = {pair: loss(pair) for pair in itertools.combinations(stack, 2)}
    _, result = measured(folder, tmp_path / "searched", rows, drop=2, by="loss")
    found = tuple(result.changed)
    assert losses[found] == min(value for pair, value in losses.items() if set(pair) & set(found))
    assert min(result.layers[name]["loss_without_nats"] for name in found) == pytest.approx(losses[found], rel=1e-5)


def test_a_block_that_went_first_comes_back_when_others_go_better_together(monkeypatch, family, tmp_path):
    losses = {"1": 1.0, "2": 2.0, "3": 3.0, "0": 4.0, "12": 5.0, "13": 5.5, "01": 7.0, "23": 4.5, "02": 6.0, "03": 6.0}

    def without(self, dropped, rows):
        return losses["".join(sorted(name[-1] for name in dropped))]

    monkeypatch.setattr(TorchModel, "loss_without", without)
    _, result = measured(deep(family, "llama"), tmp_path / "model", random_rows(2, 8), drop=2, by="loss")
    assert result.changed == ["model.layers.2", "model.layers.3"]
    assert "model.layers.3 instead of model.layers.1: 5.0000 to 4.5000 nats" in result.notes
    assert set(result.layers) == {"model.layers.2", "model.layers.3"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 6}, {"num_hidden_layers": 3}),
        ({"n_layer": 6, "n_head": 6, "vocab_size": 6}, {"n_layer": 3}),
        (
            {"num_hidden_layers": 6, "layer_types": list("abcdef"), "no_rope_layers": [1, 1, 0, 1, 1, 0]},
            {"num_hidden_layers": 3, "layer_types": ["a", "c", "f"], "no_rope_layers": [1, 0, 0]},
        ),
        (
            {"num_hidden_layers": 6, "mlp_only_layers": [0, 1, 5], "eos_token_id": [1, 2, 3, 4, 5, 0]},
            {"num_hidden_layers": 3, "mlp_only_layers": [0, 2]},
        ),
        (
            {"num_hidden_layers": 6, "max_window_layers": 4, "first_k_dense_replace": 1},
            {"num_hidden_layers": 3, "max_window_layers": 2, "first_k_dense_replace": 1},
        ),
        ({"num_hidden_layers": 6, "max_window_layers": 28}, {"num_hidden_layers": 3}),
        (
            {"model_type": "x", "text_config": {"num_hidden_layers": 6, "hidden_size": 8}},
            {"text_config": {"num_hidden_layers": 3, "hidden_size": 8}},
        ),
        (
            {"is_encoder_decoder": True, "num_layers": 6, "num_decoder_layers": 6, "encoder_layerdrop": 0.0},
            {"num_layers": 3},
        ),
        (
            {"num_hidden_layers": 6, "id2label": {"0": "a"}, "intermediate_size": [1, 2, 3, 4, 5, 6]},
            {"num_hidden_layers": 3, "intermediate_size": [1, 3, 6]},
        ),
    ],
)
def test_what_config_json_says_of_fewer_layers(config, expected):
    stack = "encoder.block" if config.get("is_encoder_decoder") else "model.layers"
    assert config_without(config, stack, 6, [0, 2, 5]) == expected


def test_a_decoder_has_settings_of_its_own():
    config = {"is_encoder_decoder": True, "encoder_layers": 6, "decoder_layers": 6, "num_hidden_layers": 6}
    assert config_without(config, "model.decoder.layers", 6, [1]) == {"decoder_layers": 1}
    assert config_without(config, "model.encoder.layers", 6, [1]) == {"encoder_layers": 1, "num_hidden_layers": 1}


def test_layer_types_that_config_json_left_to_the_architecture_are_written_out(family, tmp_path):
    """gemma2 alternates by the number of the layer: which kind each layer was must not change with its number."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in deep(family, "gemma2").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = config_of(folder)
    types = config.pop("layer_types")
    (folder / "config.json").write_text(json.dumps(config))
    shorter = open_model(folder, tmp_path / "work").without_blocks(["model.layers.1"], seed=0)
    assert config_of(shorter.location.folder)["layer_types"] == [types[0], types[2], types[3]]


def test_tensors_are_renumbered_and_kept_bit_for_bit(family, tmp_path):
    folder = deep(family, "llama")
    build(recipe(folder, ("prune-depth", {"layers": [1, 2]})), tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        after |= load_file(path)
    assert {name for name in after if ".layers." in name} == {
        name for name in before if ".layers.0." in name or ".layers.1." in name
    }
    for name, tensor in after.items():
        assert tensor.equal(before[name.replace("layers.1.", "layers.3.")])


def test_gptq_follows_on_the_model_that_is_left(family, text, tmp_path):
    steps = [("prune-depth", {"drop": 2}), ("gptq", {"group_size": 32})]
    made = recipe(deep(family, "llama"), *steps, data=text)
    plan = make_plan(made)
    assert [step.detail.split(":")[0] for step in plan.steps if step.kind == "sweep"] == [
        "4 blocks, 28 layers",
        "2 blocks, 14 layers",
    ]
    manifest = build(made, tmp_path / "out")
    assert manifest.exports[0].verification.passed
    assert len(manifest.passes[1].changed) == 14


def test_the_plan_knows_the_size(family, tmp_path):
    made = recipe(deep(family, "llama"), ("prune-depth", {"layers": [0]}))
    plan = make_plan(made)
    manifest = build(made, tmp_path / "out")
    written = sum(file.bytes for name, file in manifest.exports[0].files.items() if name.endswith(".safetensors"))
    assert plan.output_bytes == pytest.approx(written, rel=0.02)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("llama", {}, "say how many blocks to take out, or which"),
        ("llama", {"drop": 1, "layers": [0]}, "`drop` and `layers` are given"),
        ("llama", {"drop": 4}, "`4` of 4 leaves nothing"),
        ("llama", {"drop": "100%"}, "cannot read the share `100%`"),
        ("llama", {"drop": "5%"}, "`5%` of 4 leaves everything as it is"),
        ("llama", {"drop": "a few"}, "cannot read the share `a few`"),
        ("llama", {"layers": [4]}, "`layers` names 4 of `model.layers`, which has 4"),
        ("llama", {"layers": [1, 1]}, "`layers` names a layer twice"),
        ("llama", {"layers": [0, 1, 2, 3]}, "nothing would be left of `model.layers`"),
        ("llama", {"drop": 1, "stack": "decoder"}, "has one stack of blocks"),
        ("t5", {"layers": [0]}, "these layers are of the encoder or of the decoder?"),
        ("bert", {"drop": 1, "by": "loss"}, "`by: loss` measures how well a language model predicts text"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(name, params, message, family, text):
    with pytest.raises(UsageError) as caught:
        make_plan(recipe(deep(family, name), ("prune-depth", params), data=text))
    assert message in caught.value.what
    assert caught.value.hint


def test_rounded_weights_are_refused(family, text):
    with pytest.raises(UsageError, match="`prune-depth` cannot come after `rtn`"):
        make_plan(recipe(deep(family, "llama"), ("rtn", {"group_size": 32}), ("prune-depth", {"drop": 1}), data=text))


def test_a_pattern_that_the_config_cannot_hold_is_refused(family, tmp_path):
    """Every second layer of this mixture is dense: without its first the places would change."""
    folder = family("qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2)
    model = open_model(folder, tmp_path)
    with pytest.raises(UsageError) as caught:
        model.without_blocks(["model.layers.0"], seed=0)
    assert "`model.layers.1` would be another kind of block in the place of `model.layers.0`" in caught.value.where
    assert (
        len(
            open_model(folder, tmp_path / "two")
            .without_blocks(["model.layers.0", "model.layers.1"], seed=0)
            .blocks()[0]
        )
        == 2
    )


def test_stacks_that_config_json_does_not_tell_apart_are_refused(family, tmp_path):
    facts = open_model(deep(family, "llama"), tmp_path).facts
    other = [msgspec.structs.replace(one, name=f"vision.{one.name}") for one in facts.linears]
    both = msgspec.structs.replace(facts, linears=(*facts.linears, *other))
    with pytest.raises(UsageError, match="has 2 stacks of blocks"):
        PruneDepth(PruneDepthParams(drop=1)).check(both, Target.CPU)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_rotated_model_with_tied_embeddings_loses_blocks(dtype, family, tmp_path):
    folder = family("qwen2", num_hidden_layers=3, dtype=dtype)
    steps = [("rotate", {}), ("prune-depth", {"layers": [1]})]
    manifest = build(recipe(folder, *steps), tmp_path / "out")
    assert manifest.exports[0].verification.passed
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 2
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_answers_are_those_of_the_head_to_what_the_block_is_given(name, family, tmp_path):
    """Against the whole model with the later blocks left out, and with this one left out too."""
    folder = deep(family, name)
    rows = random_rows(2, 16)
    _, result = measured(folder, tmp_path / "work", rows, drop=1, by="answers")
    moved = {block: figures["answers_moved_nats"] for block, figures in result.layers.items()}
    assert len(moved) == (7 if name == "t5" else 4)
    if name != "llama":
        assert all(value > 0 for value in moved.values())
        return
    whole = open_model(folder, tmp_path / "whole")
    skeleton = whole.skeleton()
    inputs = batches(rows, decoder=False)
    for index in range(4):
        logs = []
        for first in (index + 1, index):
            later = [f"model.layers.{one}" for one in range(first, 4)]
            with leaving_out(skeleton, later):
                logs.append(streamed_outputs(skeleton, whole.read, inputs)[0]["logits"].log_softmax(-1))
        expected = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
        assert moved[f"model.layers.{index}"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["depth", "width", "vocabulary"])
def test_no_whole_model_is_in_memory(kind, family, tmp_path, monkeypatch):
    """What is read and still alive at any time: a block or two, and what lies outside the blocks."""
    monkeypatch.setattr(store, "SHARD_BYTES", 1 << 14)
    alive, most = [], 0
    original = TorchModel.read

    def read(self, name):
        nonlocal most
        tensor = original(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(one.nbytes for ref in alive if (one := ref()) is not None))
        return tensor

    model = open_model(family("llama", num_hidden_layers=12), tmp_path)
    monkeypatch.setattr(TorchModel, "read", read)
    if kind == "depth":
        model.without_blocks(["model.layers.3", "model.layers.7"], seed=0)
    elif kind == "width":
        found = model.channels(["mlp", "heads", "hidden"], seed=0)
        found.kept(model, {one.name: range(one.units // 2) for one in found.sets})
    else:
        model.with_vocabulary(range(200), {}, side_files=lambda _: None, seed=0)
    facts = model.facts
    assert facts.bytes > 8 * facts.largest_block_bytes
    assert most <= 2 * facts.largest_block_bytes + facts.outside_bytes
