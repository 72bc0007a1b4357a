"""What a block shows to passes: its layers, its stages, and the inputs of every product."""

import pytest
import torch
from families import FAMILIES, random_rows
from helpers import assert_near, grid, open_model
from llmopt.core.errors import LlmoptError
from llmopt.models.blocks import loaded
from llmopt.models.outside import outside_on_demand
from llmopt.models.replay import Replay
from llmopt.models.text import batches
from llmopt.passes.numerics.grid import round_to_nearest

EXPERTS = [f"experts.{index}." for index in range(4)]
MIXTURE = [[["q_proj", "k_proj", "v_proj"]], [["o_proj"]]]
STAGES = {
    "llama": [[["q_proj", "k_proj", "v_proj"]], [["o_proj"]], [["gate_proj", "up_proj"]], [["down_proj"]]],
    "gemma3": [[["q_proj", "k_proj", "v_proj"]], [["o_proj"]], [["gate_proj", "up_proj"]], [["down_proj"]]],
    "phi3": [[["qkv_proj"]], [["o_proj"]], [["gate_up_proj"]], [["down_proj"]]],
    "gpt2": [[["attn.c_attn"]], [["attn.c_proj"]], [["mlp.c_fc"]], [["mlp.c_proj"]]],
    "gpt_neox": [[["query_key_value"]], [["attention.dense"]], [["dense_h_to_4h"]], [["dense_4h_to_h"]]],
    "opt": [[["q_proj", "k_proj", "v_proj"]], [["out_proj"]], [["fc1"]], [["fc2"]]],
    "mixtral": [*MIXTURE, [[e + "w1", e + "w3"] for e in EXPERTS], [[e + "w2"] for e in EXPERTS]],
    "qwen3_moe": [*MIXTURE, [[e + "gate_proj", e + "up_proj"] for e in EXPERTS], [[e + "down_proj"] for e in EXPERTS]],
    "bert": [
        [["self.query", "self.key", "self.value"]],
        [["attention.output.dense"]],
        [["intermediate.dense"]],
        [["1.output.dense"]],
    ],
    "t5": [
        [["SelfAttention.q", "SelfAttention.k", "SelfAttention.v"]],
        [["SelfAttention.o"]],
        [["EncDecAttention.q"]],
        [["EncDecAttention.k", "EncDecAttention.v"]],
        [["EncDecAttention.o"]],
        [["wi"]],
        [["wo"]],
    ],
}
"""The stages of the last block of each: products, and the ends of their layers' names."""


def last_block(model, rows):
    """Yield the last block with the calibration samples brought to it."""
    skeleton = model.skeleton()
    replay = Replay(skeleton, batches(rows, decoder=bool(skeleton.config.is_encoder_decoder)))
    with outside_on_demand(skeleton, model.read):
        for stack in skeleton.stacks:
            for site in stack:
                with loaded(skeleton, site, model, replay) as block:
                    if site is skeleton.sites[-1]:
                        yield block
                    replay.finish(site, first=site is stack[0])


@pytest.fixture
def block_of(family, tmp_path):
    opened = []

    def open_block(name, rows=None, **changes):
        opened.append(last_block(open_model(family(name, **changes), tmp_path), rows or random_rows()))
        return next(opened[-1])

    yield open_block
    for one in opened:
        one.close()


@pytest.mark.parametrize("name", STAGES)
def test_stages_follow_the_forward_pass(name, block_of):
    block = block_of(name)
    stages = [[[linear.name for linear in product.linears] for product in stage] for stage in block.stages()]
    expected = STAGES[name]
    assert [[len(product) for product in stage] for stage in stages] == [[len(p) for p in stage] for stage in expected]
    for stage, ends in zip(stages, expected, strict=True):
        for product, endings in zip(stage, ends, strict=True):
            assert all(layer.endswith(end) for layer, end in zip(product, endings, strict=True)), (product, endings)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_agree_with_the_outline(name, family, tmp_path):
    model = open_model(family(name), tmp_path)
    outlined = {(linear.name, linear.out_features, linear.in_features) for linear in model.facts.linears}
    skeleton = model.skeleton()
    found = {
        (v.linear.name, v.linear.out_features, v.linear.in_features) for site in skeleton.sites for v in site.views
    }
    assert outlined == found
    assert len(skeleton.sites) == model.facts.blocks


@pytest.mark.parametrize(
    ("name", "changes"), [("mixtral", {"num_local_experts": 16}), ("qwen3_moe", {"num_experts": 16})]
)
def test_a_router_is_no_layer_to_quantize(name, changes, family, tmp_path):
    model = open_model(family(name, **changes), tmp_path)
    assert not [linear.name for linear in model.facts.linears if linear.name.endswith(".gate")]
    skeleton = model.skeleton()
    assert len(model.facts.linears) == sum(len(site.views) for site in skeleton.sites) == 2 * (4 + 3 * 16)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_the_checkpoints(name, family, tmp_path):
    model = open_model(family(name), tmp_path)
    skeleton = model.skeleton()
    transposed = {linear.name for linear in model.facts.linears if linear.transposed}
    assert bool(transposed) == (name == "gpt2")
    for site in skeleton.sites:
        with loaded(skeleton, site, model, None) as block:
            for linear in block.linears:
                stored = model.checkpoint.read(f"{linear.name}.weight")
                read = torch.cat(list(block.rows(linear, 7)))  # from the checkpoint, and then what is in memory
                weight = block.weight(linear)
                assert weight.shape == (linear.out_features, linear.in_features)
                assert weight.equal(stored.T if linear.name in transposed else stored)
                assert weight.equal(read)
                assert weight.equal(torch.cat(list(block.rows(linear, 7))))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral"])
def test_quantize_replaces_one_layer_only(name, block_of):
    block = block_of(name)
    before = {linear: block.weight(linear).clone() for linear in block.linears}
    chosen = block.linears[1]
    quantized = round_to_nearest(block.weight(chosen), grid(), torch.float32)
    block.quantize(chosen, quantized)
    assert block.weight(chosen).equal(quantized.dequantize())
    assert all(block.weight(linear).equal(before[linear]) for linear in block.linears if linear != chosen)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "gemma3", "opt", "gpt_neox", "phi3"])
def test_inputs_are_what_the_modules_multiply(name, family, tmp_path):
    model = open_model(family(name), tmp_path)
    reference, rows = model.materialize(), random_rows(3, 16)
    for block in last_block(model, rows):
        site = block.name
        expected: dict[str, list[torch.Tensor]] = {}
        names = {linear.name for linear in block.linears}
        handles = [
            module.register_forward_pre_hook(
                lambda _, args, path=path, expected=expected: expected.setdefault(path, []).append(
                    args[0].flatten(0, -2).clone()
                )
            )
            for path, module in reference.named_modules()
            if path in names
        ]
        for batch in batches(rows, decoder=bool(reference.config.is_encoder_decoder)):
            with torch.no_grad():
                reference(**batch)
        got: dict[str, list[torch.Tensor]] = {}
        for stage in block.stages():
            block.collect(stage, into(got))
        assert sorted(got) == sorted(expected) == sorted(names), site
        for path in names:
            assert_near(torch.cat(got[path]), torch.cat(expected[path]), what=path, factor=10)
        for handle in handles:
            handle.remove()


def into(table):
    """Return a receiver that appends every input to its layers' entries."""

    def receive(product, rows):
        for linear in product.linears:
            table.setdefault(linear.name, []).append(rows.clone())

    return receive


def in_order(rows):
    """Sort rows by their first column: an expert takes its tokens by rank, not by position."""
    return rows[rows[:, 0].argsort()]


@pytest.mark.parametrize(("name", "first", "last"), [("mixtral", "w1", "w2"), ("qwen3_moe", "gate_proj", "down_proj")])
def test_an_expert_sees_exactly_the_tokens_routed_to_it(name, first, last, family, tmp_path):
    model = open_model(family(name), tmp_path)
    reference, rows = model.materialize(), random_rows(3, 16)
    for block in last_block(model, rows):
        routed = {}

        def hook(_, args, routed=routed):
            routed["tokens"], routed["index"] = args[0].clone(), args[1].clone()

        experts = next(
            m for path, m in reference.named_modules() if path.startswith(block.name) and path.endswith(".experts")
        )
        handle = experts.register_forward_pre_hook(hook)
        with torch.no_grad():
            reference(**batches(rows, decoder=False)[0])
        handle.remove()
        parts: dict[str, list[torch.Tensor]] = {}
        for stage in block.stages():
            block.collect(stage, into(parts))
        got = {path: torch.cat(pieces) for path, pieces in parts.items()}
        for expert in range(4):
            expected = routed["tokens"][(routed["index"] == expert).any(-1)]
            assert len(expected)
            layer = next(key for key in got if key.endswith(f"experts.{expert}.{first}"))
            assert_near(in_order(got[layer]), in_order(expected), what=layer, factor=10)
            inner = next(key for key in got if key.endswith(f"experts.{expert}.{last}"))
            gate, up = (experts.gate_up_proj[expert] @ expected.T).chunk(2)
            activated = (torch.nn.functional.silu(gate) * up).T
            assert_near(in_order(got[inner]), in_order(activated), what=inner, factor=20)


def test_nan_in_an_activation_names_the_layer(block_of, family, tmp_path):
    block = block_of("llama")
    stages = block.stages()
    view = block._views[block.linears[0]]
    block._skeleton.parameter(view.parameter).data.fill_(float("nan"))
    with pytest.raises(LlmoptError) as caught:
        block.collect(stages[1], lambda *_: None)
    assert "self_attn.o_proj" in caught.value.what
    assert "NaN or Inf" in caught.value.what
    assert "batch 1 of" in (caught.value.where or "")
    assert caught.value.hint
    assert caught.value.exit_code == 1
