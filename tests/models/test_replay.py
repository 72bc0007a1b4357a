"""Calibration samples reach every block exactly as the whole model would bring them."""

import pytest
import torch
from families import FAMILIES, random_rows
from helpers import assert_near, open_model
from llmopt.exporters.dummy_inputs import sample_inputs
from llmopt.models.blocks import loaded
from llmopt.models.outside import outside_on_demand
from llmopt.models.replay import Replay
from llmopt.models.text import batches

# Experts chosen by a nearly equal score may differ where sums are taken in another order; these seeds have none.


def inputs_of(skeleton):
    """Return two batches of different lengths, or what the model takes instead of text."""
    if skeleton.model.main_input_name == "input_ids":
        rows = random_rows(4, 24) + random_rows(3, 11, seed=1)
        return batches(rows, decoder=bool(skeleton.config.is_encoder_decoder))
    return [dict(sample_inputs(skeleton.model).tensors)]


def whole_model_calls(model, batch, names):
    """Run the float model in one piece; return the arguments of every block, and the outputs."""
    calls = {}

    def keep(name):
        def hook(_, args, kwargs):
            calls[name] = detach((args, kwargs))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True) for name in names]
    with torch.no_grad():
        outputs = model(**batch, return_dict=True)
    for handle in handles:
        handle.remove()
    return calls, {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def detach(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return [detach(item) for item in value]
    return {key: detach(item) for key, item in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("name", FAMILIES)
def test_every_block_gets_what_the_whole_model_gives_it(name, family, tmp_path):
    model = open_model(family(name), tmp_path)
    skeleton = model.skeleton()
    inputs = inputs_of(skeleton)
    reference = model.materialize()
    names = [site.name for site in skeleton.sites]
    expected = [whole_model_calls(reference, batch, names)[0] for batch in inputs]
    replay = Replay(skeleton, inputs)
    seen = []
    with outside_on_demand(skeleton, model.read):
        for stack in skeleton.stacks:
            for site in stack:
                with loaded(skeleton, site, model, replay) as block:
                    for stage in block.stages():  # what passes do in between leaves the samples as they are
                        block.collect(stage, lambda *_: None)
                    for index in range(len(inputs)):
                        args, kwargs = replay.call(site, index)
                        got = detach((args, kwargs))
                        assert_near(got, expected[index][site.name], what=f"{site.name}, batch {index}", factor=10)
                    replay.finish(site, first=site is stack[0])
                seen.append(site.name)
    assert seen == list(expected[0])


def test_nothing_stays_in_memory(family, tmp_path):
    model = open_model(family("llama"), tmp_path)
    skeleton = model.skeleton()
    replay = Replay(skeleton, batches(random_rows(), decoder=False))
    with outside_on_demand(skeleton, model.read):
        for site in skeleton.stacks[0]:
            with loaded(skeleton, site, model, replay):
                inside = {name for name, value in skeleton.model.named_parameters() if not value.is_meta}
                replay.finish(site, first=site.name.endswith(".0"))
                outside = set(skeleton.outside)
                assert {name for name in inside if name not in outside} == set(site.parameters)
    assert all(value.is_meta for value in skeleton.model.parameters())


def test_answers_without_the_later_blocks(family, tmp_path):
    """Left out, the later blocks do nothing: the head answers to what the block returns. After the last all is one."""
    model = open_model(family("llama"), tmp_path)
    skeleton, whole = model.skeleton(), model.materialize()
    replay = Replay(skeleton, batches(random_rows(), decoder=False))
    found = {}
    with outside_on_demand(skeleton, model.read):
        for site in skeleton.stacks[0]:
            with loaded(skeleton, site, model, replay) as block:
                other = {linear: 1.1 * block.weight(linear) for linear in block.linears[:2]}
                found[site.name] = [block.divergence(other, later_blocks=later) for later in (True, False)]
                with torch.no_grad():
                    logs = [
                        torch.log_softmax(whole.lm_head(whole.model.norm(states)), -1)
                        for states in (block.output(0), block.output(0, other))
                    ]
                expected = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
                assert found[site.name][1] == pytest.approx(float(expected), rel=1e-3)
                replay.finish(site, first=site is skeleton.stacks[0][0])
    first, *_, last = found.values()
    assert last[0] == pytest.approx(last[1])
    assert first[0] != pytest.approx(first[1], rel=1e-3)
