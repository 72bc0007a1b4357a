"""What makes the input of a product, found by trial, and scales moved between the two."""

import pytest
import torch
from families import FAMILIES, random_rows
from helpers import assert_near, open_model
from llmopt.models.blocks import loaded
from llmopt.models.outside import outside_on_demand
from llmopt.models.producers import Part, same
from llmopt.models.replay import Replay
from llmopt.models.text import batches

NORM, NONE = "norm", None
LLAMA = [NORM, "v_proj", NORM, "up_proj"]
PRODUCERS = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "phi3": [NORM, "qkv_proj", NORM, "gate_up_proj"],
    "gemma2": LLAMA,
    "gemma3": LLAMA,
    "gpt2": [NORM, "c_attn", NORM, NONE],
    "gpt_neox": [NORM, NONE, NORM, NONE],
    "opt": [NORM, "v_proj", NORM, "fc1"],
    "mixtral": [NORM, "v_proj", NONE, "w3"],
    "qwen3_moe": [NORM, "v_proj", NONE, "up_proj"],
    "bert": [NONE, "value", NONE, NONE],
    "roberta": [NONE, "value", NONE, NONE],
    "distilbert": [NONE, "v_lin", NONE, NONE],
    "t5": [NORM, "v", NORM, NONE, "v", NORM, "wi"],
}
"""What can take up a scale for the products of the last block of each, in the order of the forward pass."""


def last_block(model, rows):
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


def test_every_family_that_reads_text_is_here():
    assert set(PRODUCERS) == {name for name, family in FAMILIES.items() if family.text}


@pytest.mark.parametrize("name", PRODUCERS)
def test_what_takes_up_a_scale(name, block_of):
    block = block_of(name)
    found = []
    for stage in block.stages():
        kinds = set()
        for product in stage:
            producer, norm = block._producer(product), block.norm_weight(product)
            assert (block.channels(product) is None) == (producer is None)
            kinds.add(None if producer is None else NORM if norm is not None else producer.name.rpartition(".")[2])
        assert len(kinds) == 1, kinds
        found.append(kinds.pop())
    assert found == PRODUCERS[name]


@pytest.mark.parametrize("name", PRODUCERS)
def test_balancing_leaves_the_function_as_it_was(name, block_of):
    block = block_of(name)
    before = block._output(0, whole=True)
    generator = torch.Generator().manual_seed(7)
    for stage in block.stages():
        for product in stage:
            channels = block.channels(product)
            if channels is not None:
                weight = block.weight(product.linears[0]).clone()
                factors = torch.rand(int(channels.max()) + 1, generator=generator) * 3 + 0.2
                block.balance(product, factors)
                assert_near(block.weight(product.linears[0]), weight * factors[channels])
    after = block._output(0, whole=True)
    assert same(before, after)


def test_value_heads_of_grouped_queries_share_a_factor(block_of):
    block = block_of("llama")
    channels = block.channels(block.stages()[1][0])
    # 4 query heads on 2 value heads of 16 channels.
    head = torch.arange(16)
    assert channels.tolist() == torch.cat([head, head, head + 16, head + 16]).tolist()


@pytest.mark.parametrize(("name", "offset"), [("llama", 0.0), ("gemma3", 1.0), ("gpt2", 0.0)])
def test_the_weight_of_a_norm_is_what_it_multiplies_by(name, offset, block_of):
    block = block_of(name)
    product = block.stages()[0][0]
    norm = next(module for path, module in block._site.module.named_modules() if path in {"input_layernorm", "ln_1"})
    assert_near(block.norm_weight(product), norm.weight.data + offset)


def test_an_expert_without_tokens_proves_nothing(block_of):
    """Its gate's rows would seem to do as well as its up's."""
    block = block_of("mixtral", rows=random_rows(1, 3), num_local_experts=16)
    *_, last = block.stages()
    found = [block.channels(product) is not None for product in last]
    assert 0 < sum(found) <= 6
    assert len(found) == 16


def test_dividing_a_norm_that_adds_one():
    weight = torch.tensor([0.5, -0.25, 0.0])
    factors = torch.tensor([2.0, 0.5, 4.0])
    expected = (1 + weight) / factors - 1
    Part("norm.weight", weight, 1.0).divide(factors)
    assert_near(weight, expected)


def test_outputs_that_differ_are_not_the_same():
    first = torch.randn(4, 8)
    assert same((first, None), (first + 1e-7, None))
    assert not same((first, first), (first, first + 0.1))
