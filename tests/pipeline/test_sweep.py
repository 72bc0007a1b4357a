"""The runner holds passes to their word, and a run leaves a whole artifact or none."""

import json

import pytest
import torch
from families import random_rows
from helpers import build, grid, open_model, recipe
from llmopt.core.errors import LlmoptError, UnmetError, UsageError
from llmopt.core.manifest import MANIFEST, RUN
from llmopt.core.passes import PassContext, PassResult
from llmopt.core.quantized import QuantizedWeight
from llmopt.passes.gptq import Gptq, GptqParams
from llmopt.passes.rtn import Rtn, RtnParams
from llmopt.pipeline.sweep import run_sweep


def sweep(family, work, one, rows=(), name="llama"):
    return run_sweep(open_model(family(name), work), [one], rows, PassContext())


class Untold(Rtn):
    """Quantizes a layer more than it says."""

    def run_block(self, block, linears, context):
        result = super().run_block(block, linears, context)
        result.changed.pop()
        return result


class UntoldAmongOthers(Rtn):
    """Quantizes one layer of many, and says nothing."""

    def run_block(self, block, linears, context):
        super().run_block(block, block.linears[:1], context)
        return PassResult()


class Invented(Rtn):
    """Says it changed what is not there."""

    def run_block(self, block, linears, context):
        return PassResult(changed=["nonsense"])


class Broken(Rtn):
    """Makes weights that are no numbers."""

    def run_block(self, block, linears, context):
        linear = block.linears[0]
        shape = (linear.out_features, linear.in_features // 32)
        codes = torch.ones(linear.out_features, linear.in_features, dtype=torch.uint8)
        block.quantize(linear, QuantizedWeight(codes, torch.full(shape, float("nan")), None, grid()))
        return PassResult(changed=[linear.name])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Untold, "changed model.layers.0.mlp.down_proj without saying so"),
        (UntoldAmongOthers, "changed model.layers.0.self_attn.q_proj without saying so"),
        (Invented, "says it changed `nonsense`"),
        (Broken, "made NaN or Inf in `model.layers.0.self_attn.q_proj`"),
    ],
)
def test_a_pass_that_breaks_its_word_is_caught(kind, message, family, tmp_path):
    with pytest.raises(LlmoptError, match=message):
        sweep(family, tmp_path, kind(RtnParams(group_size=32)))


@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_text_cannot_calibrate_what_takes_none(name, family, tmp_path):
    with pytest.raises(UsageError) as caught:
        sweep(family, tmp_path, Gptq(GptqParams(group_size=32)), random_rows(), name)
    assert caught.value.hint == "use rtn, which needs no calibration data"


def test_a_group_size_that_does_not_divide_is_refused_before_the_sweep(family, tmp_path):
    with pytest.raises(UsageError) as caught:
        build(recipe(family("llama"), ("rtn", {"group_size": 128})), tmp_path / "out")
    assert caught.value.what.startswith("cannot group `model.layers.0.")
    assert "--group-size 32" in (caught.value.hint or "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5", "bert"])
def test_calibrated_passes_end_to_end(name, family, text, tmp_path):
    manifest = build(recipe(family(name), ("gptq", {"group_size": 32}), data=text), tmp_path / "out")
    assert manifest.exports[0].verification.passed
    assert manifest.exports[0].verification.samples == "held-out calibration text"
    assert manifest.calibration["samples"] == 6
    assert not manifest.passes[0].skipped


def test_an_artifact_that_is_not_the_model_is_set_aside(family, tmp_path, monkeypatch):
    from llmopt.exporters.safetensors import Safetensors

    build(recipe(family("llama"), ("rtn", {"group_size": 32})), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(Safetensors, "weights_equal", lambda *_: False)
    from llmopt.core.progress import Silent
    from llmopt.pipeline.plan import make_plan
    from llmopt.pipeline.run import run_plan

    plan = make_plan(recipe(family("llama"), ("rtn", {"group_size": 16})))
    with pytest.raises(UnmetError) as caught:
        run_plan(plan, tmp_path / "out", force=True, reporter=Silent())
    assert caught.value.exit_code == 3
    assert "weights NOT equal" in (caught.value.where or "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.failed"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert (tmp_path / "out.failed" / "model.safetensors").is_file()


def test_same_bytes_twice(family, text, tmp_path):
    for name in ("first", "second"):
        build(recipe(family("llama"), ("gptq", {"group_size": 32}), data=text), tmp_path / name)
    first, second = (
        {
            path.relative_to(tmp_path / name): path
            for path in sorted((tmp_path / name).rglob("*"))
            if path.is_file() and path.name != RUN
        }
        for name in ("first", "second")
    )
    assert list(first) == list(second)
    for key, path in first.items():
        assert path.read_bytes() == second[key].read_bytes(), key


def test_the_manifest_names_every_file(family, tmp_path):
    import hashlib

    build(recipe(family("llama"), ("rtn", {"group_size": 32})), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "llmopt.json").read_text())
    files = dict(records(manifest))
    for name, record in files.items():
        data = (tmp_path / "out" / name).read_bytes()
        assert record == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    there = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert there - set(files) == {MANIFEST, RUN}


def records(value):
    """Yield every file's record in a manifest."""
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, dict) and set(item) == {"bytes", "sha256"}:
                yield key, item
            else:
                yield from records(item)
    elif isinstance(value, list):
        for item in value:
            yield from records(item)
