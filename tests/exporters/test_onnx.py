from __future__ import annotations

import hashlib
import inspect
from typing import TYPE_CHECKING, Any

import pytest
from families import FAMILIES, make_model
from llmopt.core.errors import UsageError
from llmopt.core.exports import ExportContext
from llmopt.core.quantized import Grid
from llmopt.exporters.dummy_inputs import sample_inputs
from llmopt.exporters.onnx import Onnx, OnnxParams
from llmopt.runtimes.onnxruntime_ import OnnxRuntime
from standin import StandIn, linears_of, quantized_standin

if TYPE_CHECKING:
    from pathlib import Path

INT4 = Grid(bits=4, group_size=32, symmetric=True)
PROMPT = [5, 9, 200, 31, 7, 111, 90, 4, 77, 12]


def export(model: StandIn, directory: Path, **params: Any) -> list[str]:
    exporter = Onnx(OnnxParams(**params))
    grid = next(iter(model.quantized.values()), None)
    exporter.check(model.facts, grid)
    notes = exporter.export(model, directory, ExportContext()).notes
    assert exporter.weights_equal(model, directory) is (True if grid else None)
    return notes


def check_alike(model: Any, directory: Path) -> None:
    """A padded batch of another size than the traced one gives transformers' logits, and so do eight tokens."""
    import numpy as np
    import torch

    session = OnnxRuntime().open(directory, threads=1)
    inputs = dict(sample_inputs(model).tensors)
    if "input_ids" in inputs:
        inputs["input_ids"] = torch.tensor([PROMPT, PROMPT[::-1], PROMPT])
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones(3, len(PROMPT), dtype=torch.int64)
        inputs["attention_mask"][1, -3:] = 0
    if "token_type_ids" in inputs:
        inputs["token_type_ids"] = torch.zeros(3, len(PROMPT), dtype=torch.int64)
    inputs = {name: (value if len(value) == 3 else torch.cat([value, value])[:3]) for name, value in inputs.items()}
    with torch.no_grad():
        outputs = model(**inputs)
    name = "logits" if "logits" in outputs else "last_hidden_state"
    expected = outputs[name].numpy()
    made = session.outputs({name: value.numpy() for name, value in inputs.items()})[name]
    if made.ndim == 3 and "attention_mask" in inputs and not model.config.is_encoder_decoder:
        kept = inputs["attention_mask"].numpy().astype(bool)
        made, expected = made[kept], expected[kept]
    assert np.abs(made - expected).max() < 2e-4
    if model.can_generate() and "input_ids" in inputs:
        ids = torch.tensor([PROMPT])
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None
        )[0].tolist()
        start = 1 if model.config.is_encoder_decoder else len(PROMPT)
        assert session.generate(PROMPT, 8) == text[start:]


def test_language_model_with_codes(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    model = quantized_standin(make_model(FAMILIES["llama"], num_hidden_layers=1), INT4)
    export(model, tmp_path, activations="float32")
    assert capfd.readouterr().out == ""
    check_alike(model.model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"model.onnx", "model.onnx.data", "config.json"}
    assert not [file for file in tmp_path.iterdir() if b"site-packages" in file.read_bytes()]


def test_language_model_in_standard_operators_with_a_tied_embedding_stored_once(tmp_path: Path):
    import onnx

    model = StandIn(make_model(FAMILIES["gpt2"], n_layer=1))
    export(model, tmp_path, fuse=False)
    check_alike(model.model, tmp_path)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    assert {node.domain for node in graph.node} == {""}
    weights = sum(parameter.nbytes for parameter in model.model.parameters())
    assert (tmp_path / "model.onnx.data").stat().st_size < weights + 20_000


def test_encoder_with_codes(tmp_path: Path):
    model = quantized_standin(make_model(FAMILIES["bert"], num_hidden_layers=1), INT4)
    export(model, tmp_path, activations="float32")
    check_alike(model.model, tmp_path)


def test_fused_product_with_a_layer_left_alone(tmp_path: Path):
    model = make_model(FAMILIES["llama"], num_hidden_layers=1)
    standin = StandIn(model, {"model.layers.0.self_attn.q_proj": INT4, "model.layers.0.mlp.up_proj": INT4})
    export(standin, tmp_path, activations="float32")
    check_alike(model, tmp_path)


def test_without_cache_it_says_so(tmp_path: Path):
    model = StandIn(make_model(FAMILIES["opt"], num_hidden_layers=1))
    assert any("no cache" in note for note in export(model, tmp_path, cache=False))
    check_alike(model.model, tmp_path)


@pytest.mark.slow
def test_the_same_model_gives_the_same_bytes(tmp_path: Path, fresh_traces: None):
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export(quantized_standin(make_model(FAMILIES["llama"], num_hidden_layers=1), INT4), tmp_path / name)
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((tmp_path / name).iterdir())])
    assert digests[0] == digests[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, kind: str, tmp_path: Path):
    model = make_model(FAMILIES[family])
    export(StandIn(model) if kind == "float" else quantized_standin(model, INT4), tmp_path, activations="float32")
    check_alike(model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_with_codes(family: str, tmp_path: Path):
    model = make_model(FAMILIES[family], num_hidden_layers=1)
    stacks = ("gate_up_proj", "down_proj")
    experts = {f"model.layers.0.mlp.experts.{name}.{place}": INT4 for name in stacks for place in range(4)}
    others = {name: INT4 for name, (_, width) in linears_of(model) if INT4.divides(width)}
    export(StandIn(model, experts | others), tmp_path, activations="float32")
    check_alike(model, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_sample_inputs_are_what_forward_takes(family: str):
    import torch

    model = make_model(FAMILIES[family])
    sample = sample_inputs(model)
    assert set(sample.tensors) <= set(inspect.signature(model.forward).parameters)
    assert set(sample.axes) == set(sample.tensors)
    with torch.no_grad():
        assert next(iter(model(**sample.tensors).values())).isfinite().all()


def test_unknown_kinds_of_input_are_refused():
    model = make_model(FAMILIES["bert"])
    model.__class__ = type("Odd", (model.__class__,), {"main_input_name": "point_cloud"})
    with pytest.raises(UsageError, match="point_cloud"):
        sample_inputs(model)
