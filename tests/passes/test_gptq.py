"""The GPTQ pass over whole models, against the same written down plainly."""

from pathlib import Path

import pytest
import torch
from families import random_rows
from helpers import open_model
from llmopt.core.block import Linear, Product
from llmopt.core.passes import PassContext
from llmopt.core.plan import Limits
from llmopt.models.text import batches, load_tokenizer
from llmopt.passes.gptq import Gptq, GptqParams
from llmopt.passes.numerics.gptq import gptq
from llmopt.passes.numerics.grid import round_to_nearest
from llmopt.passes.numerics.hessian import Hessian, factorize
from llmopt.pipeline.sweep import run_sweep

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
DENSE = ["llama", "gpt2", "phi3", "t5", "bert", "gemma3", "opt", "gpt_neox"]
MIXTURES = ["mixtral", "qwen3_moe"]
ROWS = random_rows(12, 32)


def swept(folder, work, rows=ROWS, **params):
    """Return the handle after GPTQ, and what the pass says."""
    model = open_model(folder, work)
    settings = {"group_size": 32, "act_order": True, "prefits": 0, "refits": 0} | params
    (result,) = run_sweep(model, [Gptq(GptqParams(**settings))], rows, PassContext())
    return model, result


def module_inputs(model, paths, rows):
    """Run the whole model; return the inputs of some modules, rows of tokens."""
    seen = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: seen[path].append(args[0].flatten(0, -2).clone())
        )
        for path in paths
    ]
    with torch.no_grad():
        for batch in batches(rows, decoder=bool(model.config.is_encoder_decoder)):
            model(**batch)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(parts) for path, parts in seen.items()}


def plain_gptq(model, names, grid, rows, *, exact=None, share=0.0):
    """GPTQ without streaming: one layer after another, the whole model run again for each set of equal inputs.

    With the float model beside it as `exact`, each layer aims at what it gave there, as far as `share` says.
    """
    made, left = {}, list(names)
    before = {} if exact is None else module_inputs(exact, names, rows)
    while left:
        inputs = module_inputs(model, left, rows)
        group = [path for path in left if torch.equal(inputs[path], inputs[left[0]])] if left else []
        hessian = Hessian(inputs[left[0]].shape[1])
        hessian.add(inputs[left[0]])
        factor = factorize(hessian.matrix, damping=0.01, act_order=True)
        for path in group:
            module = model.get_submodule(path)
            turned = type(module).__name__ == "Conv1D"
            weight = module.weight.data.T if turned else module.weight.data
            if exact is not None:
                drift = inputs[path].T @ ((before[path] - inputs[path]) @ weight.T) / len(inputs[path])
                weight = weight + share * torch.linalg.solve(factor.hessian, drift).T
            quantized, _ = gptq(weight.contiguous(), factor, grid, torch.float32, refits=0)
            value = quantized.dequantize()
            module.weight.data.copy_(value.T if turned else value)
            made[path] = quantized
            left.remove(path)
    return made


def in_order(names):
    """Put the layers of a model into the order in which a forward pass reaches them."""
    ends = ["query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"]
    ends += ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    ends += ["SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o"]
    ends += ["EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v", "EncDecAttention.o", "wi", "wo"]
    ends += ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    ends += [".q_proj", ".k_proj", ".v_proj", "qkv_proj", ".o_proj", "out_proj"]
    ends += ["gate_up_proj", "gate_proj", ".up_proj", "down_proj", "fc1", "fc2"]

    def rank(name):
        stack = 0 if name.startswith("encoder.") else 1
        number = next(int(part) for part in name.split(".") if part.isdigit())
        return stack, number, next(index for index, end in enumerate(ends) if name.endswith(end))

    return sorted(names, key=rank)


@pytest.mark.parametrize("name", DENSE)
def test_the_sweep_equals_gptq_on_the_whole_model(name, family, tmp_path):
    model, result = swept(family(name), tmp_path)
    names = in_order(model.quantized)
    assert sorted(result.changed) == sorted(linear.name for linear in model.facts.linears)
    whole = open_model(family(name), tmp_path / "other").materialize()
    expected = plain_gptq(whole, names, model.quantized[names[0]], ROWS)
    first = 3 if name in {"t5", "bert", "opt", "llama", "gemma3"} else 1
    for index, path in enumerate(names):
        got = model.quantized_weight(path)
        assert got.scale.equal(expected[path].scale), path
        different = float((got.codes != expected[path].codes).float().mean())
        # Sums taken in another order part at ties, and each such code shifts the inputs of all later layers a little.
        assert different <= (0.005 if index < first else 0.05), f"{path}: {different:.2%} of the codes"


@pytest.mark.parametrize(("name", "compared"), [("llama", None), ("gpt2", 3), ("bert", 6)])
def test_a_correction_aims_at_what_the_float_model_gives(name, compared, family, tmp_path):
    """Up to the layer where the last bit of a sum first makes another code, for which all later layers make up."""
    model, _ = swept(family(name), tmp_path, correction=0.5)
    names = in_order(model.quantized)
    whole, exact = (open_model(family(name), tmp_path / other).materialize() for other in ("whole", "exact"))
    expected = plain_gptq(whole, names, model.quantized[names[0]], ROWS, exact=exact, share=0.5)
    for path in names[:compared]:
        different = float((model.quantized_weight(path).codes != expected[path].codes).float().mean())
        assert different <= 0.01, f"{path}: {different:.2%} of the codes"
    plain, _ = swept(family(name), tmp_path / "plain")
    assert plain.quantized_weight(names[0]).codes.equal(model.quantized_weight(names[0]).codes)  # nothing before it
    assert not plain.quantized_weight(names[-1]).codes.equal(model.quantized_weight(names[-1]).codes)


def test_a_correction_leaves_experts_as_they_are_and_says_how_many(family, tmp_path):
    model, result = swept(family("mixtral"), tmp_path, correction=0.5)
    experts = [name for name in model.quantized if ".experts." in name]
    assert result.metrics["uncorrected_layers_count"] == len(experts) > 0


def test_a_corrected_model_answers_more_like_the_float_one(tmp_path):
    """Two bits, the bundled model: the divergence falls by a tenth and more; text that was not calibrated on."""
    tokenizer = load_tokenizer(TINY)
    ids = tokenizer((TINY / "calibration.txt").read_text())["input_ids"]
    rows = [ids[start : start + 128] for start in range(0, 4096, 128)]
    held = tokenizer((TINY / "heldout.txt").read_text())["input_ids"][:1024]
    batch = {"input_ids": torch.tensor(held).view(-1, 128)}
    with torch.no_grad():
        expected = open_model(TINY, tmp_path / "float").materialize()(**batch).logits.log_softmax(-1)
        found = []
        for share in (0.0, 0.5):
            model, _ = swept(TINY, tmp_path / str(share), rows=rows, bits=2, prefits=1, refits=2, correction=share)
            logits = model.materialize()(**batch).logits.log_softmax(-1)
            found.append(float((expected.exp() * (expected - logits)).sum(-1).mean()))
    assert found[1] < 0.9 * found[0], found


@pytest.mark.parametrize("name", MIXTURES)
def test_every_expert_has_a_hessian_of_its_own(name, family, tmp_path):
    """Of the first block, whose inputs are the float model's but for attention, by the tokens routed to each expert."""
    model, result = swept(family(name), tmp_path, ignore=("*_proj",) if name == "mixtral" else ("*.self_attn.*",))
    assert {skip.reason for skip in result.skipped} <= {"ignored by `*_proj`", "ignored by `*.self_attn.*`"}
    whole = open_model(family(name), tmp_path / "other").materialize()
    experts = next(m for path, m in whole.named_modules() if path.endswith(".experts"))
    routed = []
    handle = experts.register_forward_pre_hook(lambda _, args: routed.append((args[0].clone(), args[1].clone())))
    with torch.no_grad():
        for batch in batches(ROWS, decoder=False):
            whole(**batch)
    handle.remove()
    tokens, index = (torch.cat(parts) for parts in zip(*routed, strict=True))
    gates = [
        path for path in model.quantized if path.startswith("model.layers.0.") and path.endswith(("w1", "gate_proj"))
    ]
    assert len(gates) == 4
    for path in gates:
        number = int(path.split(".experts.")[1].split(".")[0])
        hessian = Hessian(64)
        hessian.add(tokens[(index == number).any(-1)])
        factor = factorize(hessian.matrix, damping=0.01, act_order=True)
        source = model.checkpoint.read(f"{path}.weight")
        expected, _ = gptq(source, factor, model.quantized[path], torch.float32, refits=0)
        got = model.quantized_weight(path)
        assert float((got.codes != expected.codes).float().mean()) <= 0.005, path
        other = round_to_nearest(source, model.quantized[path], torch.float32)
        assert not got.codes.equal(other.codes)


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral"])
def test_same_codes_twice(name, family, tmp_path):
    first, _ = swept(family(name), tmp_path / "first")
    second, _ = swept(family(name), tmp_path / "second")
    for layer in first.quantized:
        assert first.quantized_weight(layer).codes.equal(second.quantized_weight(layer).codes)
        assert first.quantized_weight(layer).scale.equal(second.quantized_weight(layer).scale)


def test_two_threads_make_an_equally_good_model(family, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two, _ = swept(family("llama"), tmp_path / "two")
    finally:
        torch.set_num_threads(before)
    one, _ = swept(family("llama"), tmp_path / "one")
    for layer in one.quantized:
        same = one.quantized_weight(layer).codes == two.quantized_weight(layer).codes
        assert float(same.float().mean()) > 0.95, layer


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_outputs_are_nearer_than_with_rounding_to_nearest(bits, family, tmp_path):
    from llmopt.passes.rtn import Rtn, RtnParams

    rows = random_rows(24, 48, seed=3)
    model, _ = swept(family("llama"), tmp_path / "gptq", rows=rows, bits=bits, refits=3)
    rounded = open_model(family("llama"), tmp_path / "rtn")
    run_sweep(rounded, [Rtn(RtnParams(group_size=32, bits=bits))], [], PassContext())
    original = open_model(family("llama"), tmp_path / "float").materialize()
    (batch,) = batches(random_rows(8, 48, seed=4), decoder=False)
    with torch.no_grad():
        expected = original(**batch).logits
        errors = [float((one.materialize()(**batch).logits - expected).square().mean()) for one in (model, rounded)]
    assert errors[0] < errors[1]


class FakeBlock:
    """A block of one product whose inputs the test chooses."""

    name, dtype = "block", "float32"

    def __init__(self, rows, out_features=8):
        self.rows = rows
        self.linears = (Linear("layer", out_features, rows.shape[1]),)
        self.weights = {self.linears[0]: torch.randn(out_features, rows.shape[1])}
        self.results = {}

    def weight(self, linear):
        return self.weights[linear]

    def mask(self, linear):
        return None

    def quantize(self, linear, weight):
        self.results[linear] = weight

    def stages(self):
        return [(Product(self.linears),)]

    def collect(self, stage, receive):
        receive(stage[0], self.rows)


def run_on(rows, **params):
    block = FakeBlock(rows)
    one = Gptq(GptqParams(**({"group_size": 16} | params)))
    return block, one.run_block(block, block.linears, PassContext())


def test_a_layer_that_never_sees_anything_but_zeros_is_rounded_to_nearest_and_says_so():
    block, result = run_on(torch.zeros(10, 32))
    assert result.changed == ["layer"]
    assert result.metrics["rounded_to_nearest_count"] == 1
    assert result.notes
    assert "rounded to nearest" in result.notes[0]
    expected = round_to_nearest(block.weights[block.linears[0]], one_grid(), torch.float32)
    assert block.results[block.linears[0]].codes.equal(expected.codes)


def one_grid():
    return Gptq(GptqParams(group_size=16)).grid()


def test_no_token_at_all_is_told_apart_from_zeros():
    _, none = run_on(torch.zeros(0, 32))
    _, zeros = run_on(torch.zeros(10, 32))
    assert none.notes == ["layer: no calibration token reaches it; rounded to nearest"]
    assert zeros.notes != none.notes


def test_raised_damping_and_dead_inputs_are_reported():
    rows = torch.ones(4, 32)
    rows[:, :3] = 0
    _, result = run_on(rows, damping=0.0)
    assert result.metrics["damping_max_ratio"] > 0
    assert any("damping raised to" in note for note in result.notes)
    assert "layer: 3 of 32 inputs are always zero" in result.notes


def test_nothing_is_reported_when_nothing_happened():
    torch.manual_seed(0)
    _, result = run_on(torch.randn(200, 32))
    assert result.notes == []
    assert result.skipped == []
    assert result.metrics == {"damping_max_ratio": 0.01}


def test_an_expert_without_tokens_is_rounded_to_nearest(family, tmp_path):
    _, result = swept(family("mixtral", num_local_experts=16), tmp_path, rows=random_rows(1, 3), min_tokens=0)
    idle = [note for note in result.notes if "no calibration token reaches it" in note]
    assert idle
    assert result.metrics["rounded_to_nearest_count"] == len(idle)


def test_one_expert_at_a_time_makes_the_same_codes(family, tmp_path):
    together, _ = swept(family("mixtral"), tmp_path / "together")
    apart = open_model(family("mixtral"), tmp_path / "apart")
    one = Gptq(GptqParams(group_size=32, prefits=0, refits=0))
    run_sweep(apart, [one], ROWS, PassContext(statistics_bytes=0))
    for layer in together.quantized:
        assert together.quantized_weight(layer).codes.equal(apart.quantized_weight(layer).codes), layer


def test_a_layer_that_too_few_tokens_reach_is_rounded_to_nearest():
    _, few = run_on(torch.randn(15, 32), min_tokens=0.5)
    _, enough = run_on(torch.randn(16, 32), min_tokens=0.5)
    assert few.notes == ["layer: 15 calibration tokens reach it, 16 are needed; rounded to nearest"]
    assert enough.notes == []


def test_the_report_says_how_many_tokens_experts_saw(family, tmp_path):
    _, result = swept(family("mixtral"), tmp_path)
    told = [result.metrics[f"expert_tokens_{which}_count"] for which in ("least", "median", "most")]
    assert told == sorted(told)
    assert told[-1] > 0
    assert result.notes[-1] == f"experts saw {told[0]} to {told[2]} calibration tokens, median {told[1]}"


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_hidden_states_on_disk_make_the_same_codes(name, family, tmp_path):
    kept, _ = swept(family(name), tmp_path / "kept")
    spilled = open_model(family(name), tmp_path / "spilled")
    one = Gptq(GptqParams(group_size=32, prefits=0, refits=0))
    run_sweep(spilled, [one], ROWS, PassContext(), Limits(states_bytes=0))
    assert list(spilled.store.folder.glob("states-*.pt"))
    for layer in kept.quantized:
        assert kept.quantized_weight(layer).codes.equal(spilled.quantized_weight(layer).codes), layer


def test_a_layer_that_the_samples_never_reach_is_skipped(family, tmp_path):
    class Unreached(FakeBlock):
        def stages(self):
            return []

    block = Unreached(torch.randn(10, 32))
    result = Gptq(GptqParams(group_size=16)).run_block(block, block.linears, PassContext())
    assert result.changed == []
    assert result.skipped == [("layer", "the calibration samples never reach it")]
