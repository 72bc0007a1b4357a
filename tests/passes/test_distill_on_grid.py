"""Quantized students: they learn on their grids, and what is exported is what learnt."""

import pytest
import torch
import transformers
from families import save_family
from helpers import build, open_model, recipe
from llmopt.calibration.packed import load_rows
from llmopt.core.errors import UsageError
from llmopt.core.progress import Silent
from llmopt.core.quantized import Grid
from llmopt.core.text import TextRequest
from llmopt.models.text import load_tokenizer
from llmopt.passes.numerics.grid import round_to_nearest
from llmopt.passes.training.losses import divergence
from llmopt.passes.training.on_grid import OnGrid

LEARN = {"steps": 12, "batch_size": 4, "length": 16, "learning_rate": 3e-3, "held_out": 8}


def weight(rows=24, columns=32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, 32), (4, "channel"), (8, "tensor")])
@pytest.mark.parametrize("transposed", [False, True])
class TestGrid:
    def made(self, bits, group_size, symmetric, dtype, transposed):
        start = round_to_nearest(weight(), Grid(bits=bits, group_size=group_size, symmetric=symmetric), dtype)
        return start, OnGrid(start, transposed=transposed, scales=True)

    def test_it_begins_as_it_was(self, bits, group_size, symmetric, dtype, transposed):
        start, grid = self.made(bits, group_size, symmetric, dtype, transposed)
        held = start.dequantize().float()
        latent = held.T.contiguous() if transposed else held
        assert torch.equal(grid(latent), latent)
        assert torch.equal(grid.quantized(latent).codes, start.codes)

    def test_what_it_computes_with_is_what_is_kept(self, bits, group_size, symmetric, dtype, transposed):
        start, grid = self.made(bits, group_size, symmetric, dtype, transposed)
        generator = torch.Generator().manual_seed(1)
        latent = start.dequantize().float() + 0.1 * torch.randn(start.shape, generator=generator)
        latent = latent.T.contiguous() if transposed else latent
        grid.factor.data.mul_(1 + 0.3 * torch.rand(grid.factor.shape, generator=generator))
        made, used = grid.quantized(latent), grid(latent)
        assert torch.equal(made.dequantize().float(), used.T if transposed else used)
        assert made.scale.dtype == dtype
        assert not torch.equal(made.codes, start.codes)
        assert int(made.codes.max()) < 2**bits
        if not symmetric:
            assert torch.equal(made.zero_point, start.zero_point)


def test_gradients_pass_straight_through_and_stop_outside_the_range():
    start = round_to_nearest(weight(), Grid(bits=2, group_size=16, symmetric=True), torch.float32)
    latent = start.dequantize()
    latent[0, 0] = 5.0
    latent.requires_grad_()
    grid = OnGrid(start, transposed=False, scales=True)
    grid(latent).sum().backward()
    assert float(latent.grad[0, 0]) == 0.0
    assert torch.equal(latent.grad[1:], torch.ones_like(latent.grad[1:]))
    assert grid.factor.grad is not None


def test_codes_learn():
    target = weight()
    start = round_to_nearest(-target, Grid(bits=4, group_size=16, symmetric=False), torch.float32)
    grid, latent = OnGrid(start, transposed=False, scales=False), start.dequantize().requires_grad_()
    optimizer = torch.optim.Adam([latent], lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        (grid(latent) - target).square().mean().backward()
        optimizer.step()
    best = round_to_nearest(target, Grid(bits=4, group_size=16, symmetric=False), torch.float32)
    reached = float((grid.quantized(latent).dequantize() - target).square().mean())
    assert not torch.equal(grid.quantized(latent).codes, start.codes)
    assert reached < 0.2 * float((start.dequantize() - target).square().mean())
    assert reached < 30 * float((best.dequantize() - target).square().mean())


def kl_of(artifact, teacher, rows):
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (artifact, teacher)
    ]
    batch = torch.tensor([list(row) for row in rows])
    with torch.no_grad():
        ours, theirs = (model(batch).logits for model in models)
    return float(divergence("kl", ours, theirs).mean())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_student_learns_and_is_exported_as_it_learnt(family, text, tmp_path, name, bits):
    """The loss measured while it learnt is that of the artifact, opened by transformers."""
    learn = ("distill", {"data": str(text), **LEARN})
    made = recipe(
        family(name),
        ("rtn", {"bits": bits, "group_size": 32}),
        learn,
        export=("safetensors", {"format": "auto" if name == "llama" else "plain"}),  # readers take Linear layers only
    )
    record = build(made, tmp_path / "out").passes[1]
    before, after = record.metrics["held_out_kl_before_nats"], record.metrics["held_out_kl_after_nats"]
    assert after < 0.8 * before
    assert record.metrics["on_grid_count"] == 2 * (7 if name == "llama" else 4)
    request = TextRequest(str(text), None, 16, True, LEARN["steps"] * LEARN["batch_size"], LEARN["held_out"])
    rows = load_rows(request, load_tokenizer(family(name)), tmp_path / "rows.bin", seed=0, reporter=Silent()).held_out
    assert kl_of(tmp_path / "out", family(name), rows) == pytest.approx(after, rel=1e-3)


def test_scales_may_stay(family, text, tmp_path):
    from safetensors.torch import load_file

    rtn = ("rtn", {"bits": 4, "group_size": 32})
    other = str(family("llama", num_hidden_layers=3))  # there is much to learn from it
    learn = ("distill", {"data": str(text), "teacher": other, **LEARN, "learn_scales": False, "steps": 40})
    build(recipe(family("llama"), rtn), tmp_path / "before")
    build(recipe(family("llama"), rtn, learn), tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    scales = [name for name in before if name.endswith("weight_scale")]
    assert scales
    assert all(torch.equal(before[name], after[name]) for name in scales)
    assert any(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight_packed"))


def test_a_run_goes_on_where_it_was(family, text, tmp_path, monkeypatch):
    from llmopt.passes.training.loop import Loop
    from safetensors.torch import load_file

    rtn = ("rtn", {"bits": 3, "group_size": 32})
    kept = {"checkpoint": str(tmp_path / "kept"), "checkpoint_every": 5}
    build(recipe(family("llama"), rtn, ("distill", {"data": str(text), **LEARN})), tmp_path / "whole")
    step, failed = Loop._step, []

    def failing(self, number):
        if number == 7 and not failed:
            failed.append(number)
            raise RuntimeError("power cut")
        return step(self, number)

    monkeypatch.setattr(Loop, "_step", failing)
    made = recipe(family("llama"), rtn, ("distill", {"data": str(text), **LEARN, **kept}))
    with pytest.raises(RuntimeError, match="power cut"):
        build(made, tmp_path / "out")
    build(made, tmp_path / "out")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_other_numbers_are_refused(family, text, tmp_path):
    learn = {"data": str(text), **LEARN}
    with pytest.raises(UsageError, match="cannot learn on its grid"):
        build(recipe(family("llama"), ("rtn", {"number": "fp8"}), ("distill", learn)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_quantized_layers_by_parameter(tmp_path):
    model = open_model(save_family("llama", tmp_path / "llama"), tmp_path / "work")
    assert model.quantized_parameters() == {}
